from pathlib import Path

import pytest

from megadistill.launch.node import open_run
from tests.launch.configs import write_config


def test_runs_and_exports_stay_below_the_allowed_roots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path)
    monkeypatch.setenv("MEGADISTILL_ROOTS", f"/nowhere:{tmp_path}")
    open_run(config, ())
    with pytest.raises(
        ValueError, match=r"checkpoint\.export_dir: found /etc/model, expected a path"
    ):
        open_run(config, ["checkpoint.export_dir=/etc/model"])
    with pytest.raises(ValueError, match=r"runs_dir: found .*expected a path below /nowhere"):
        open_run(config, [f"runs_dir={tmp_path}/../elsewhere"])
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(ValueError, match="runs_dir: found"):
        open_run(config, [f"runs_dir={tmp_path}/link"])
    monkeypatch.delenv("MEGADISTILL_ROOTS")
    open_run(config, ["runs_dir=/anywhere"])
