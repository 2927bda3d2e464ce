"""A run whose order follows its gradients measures the same in every layout."""

from pathlib import Path
from typing import Any

import pytest

from megadistill.metrics import read_metrics
from megadistill.rundir import RunDir
from tests.e2e.small_run import finish, make_models, start, train_command, write_run
from tests.tiny import Tree

pytestmark = [pytest.mark.vllm, pytest.mark.megatron, pytest.mark.multi, pytest.mark.slow]

BRANCHES: Tree = {
    "general": {"pool": "general", "teacher": "general", "mass": 0.8, "scale": 2.0},
    "medical": {"pool": "medical", "teacher": "general", "role": "preserve", "mass": 0.8},
}
"""Neither is taught by the student's twin: its gradient would be rounding alone."""


def measured(folder: Path, name: str, **layout: int) -> list[dict[str, Any]]:
    """The steps of a run that moves so little that every layout samples the same."""
    schedule = {"kind": "counteraction", "every": 2, "prompts": 4}
    config = write_run(
        folder,
        name,
        algorithm={"kind": "mopd", "branches": BRANCHES, "schedule": schedule},
        rollout={"max_tokens": 8, "max_num_seqs": 8, "max_staleness": 1},
        optimizer={"lr": 1e-7},
        parallel=layout,
    )
    finish(start(train_command(config)))
    return read_metrics(RunDir(folder / "runs" / name).metrics_file)[1:]


@pytest.mark.timeout(600)
def test_the_cosine_is_that_of_one_process(tmp_path: Path) -> None:
    make_models(tmp_path)
    alone = measured(tmp_path, "alone")
    for layout in ({"tp": 2}, {"pp": 2}):
        rows = measured(tmp_path, "_".join(layout), **layout)
        assert [row["branch"] for row in rows] == ["general"] * 3 + ["medical"]
        for row, expected in zip(rows, alone, strict=True):
            probed = [key for key in expected if key.startswith(("probe/", "schedule/"))]
            assert len(probed) == (4 if row["step"] % 2 == 0 else 1)
            assert [row[key] for key in probed] == pytest.approx(
                [expected[key] for key in probed], rel=0.02, abs=1e-4
            )
