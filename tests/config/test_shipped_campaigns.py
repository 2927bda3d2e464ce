"""Every stage of every campaign that we ship names a configuration that loads, with its words."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from megadistill.config import load_config
from megadistill.config.campaign import is_campaign, load_campaign
from megadistill.config.evaluate import load_evaluate
from megadistill.config.prepare import load_prepare
from megadistill.config.refine import load_refine

ROOT = Path(__file__).parents[2]
CAMPAIGNS = [
    path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if not path.name.startswith("_") and is_campaign(path)
]


class Named(Protocol):
    """Every configuration is."""

    @property
    def name(self) -> str: ...


LOADERS: dict[str, Callable[[str, Sequence[str]], Named]] = {
    "train": load_config,
    "refine": load_refine,
    "eval": load_evaluate,
    "prepare": load_prepare,
}


@pytest.mark.parametrize("path", CAMPAIGNS, ids=lambda path: path.name)
def test_stages_load_and_runs_have_their_own_names(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    stages = load_campaign(path).stages
    loaded = {
        name: LOADERS[stage.verb](stage.config, stage.args)
        for name, stage in stages.items()
        if stage.config is not None
    }
    runs = [loaded[name].name for name, stage in stages.items() if stage.verb == "train"]
    assert len(set(runs)) == len(runs)
    directories = {f"runs/{config.name}" for config in loaded.values()}
    words = [
        word.partition("=")[2] or word
        for stage in stages.values()
        if stage.config is None and stage.verb in ("report", "eval")
        for word in stage.args
        if not word.startswith("--")
    ]
    for directory in ",".join(words).split(",") if words else []:
        assert any(directory.startswith(known) for known in directories), directory


def test_the_grid_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stages = load_campaign(ROOT / "configs/campaign/raft_grid.yaml").stages
    cells = [load_config(str(s.config), s.args) for s in stages.values() if s.verb == "train"]
    settings = {(str(run.data.pools["refined"]), str(run.algorithm)) for run in cells}
    assert len(settings) == len(cells) == 4 * (1 + 2 * 3 + 1)
