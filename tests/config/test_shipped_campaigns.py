"""Every stage of every campaign that we ship names a configuration that loads, with its words."""

from pathlib import Path

import pytest

from megadistill.config import KINDS, CampaignConfig, KindName, RunConfig, kind_of, load

ROOT = Path(__file__).parents[2]
CAMPAIGNS = [
    path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if not path.name.startswith("_") and kind_of(path) == "campaign"
]
KIND_OF: dict[str, KindName] = {
    "train": "run",
    "eval": "eval",
    "refine": "refine",
    "prepare": "prepare",
}
"""A verb -> what its configuration is."""


@pytest.mark.parametrize("path", CAMPAIGNS, ids=lambda path: path.name)
def test_stages_load_and_runs_have_their_own_names(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    stages = load(CampaignConfig, path).stages
    loaded = {
        name: load(KINDS[KIND_OF[stage.verb]], stage.config, stage.args)
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
        if not word.startswith("--") and word != "compare"
    ]
    for directory in ",".join(words).split(",") if words else []:
        assert any(directory.startswith(known) for known in directories), directory


def test_the_grid_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stages = load(CampaignConfig, ROOT / "configs/campaign/raft_grid.yaml").stages
    cells = [load(RunConfig, str(s.config), s.args) for s in stages.values() if s.verb == "train"]
    settings = {(str(run.data.pools["refined"]), str(run.algorithm)) for run in cells}
    assert len(settings) == len(cells) == 4 * (1 + 2 * 3 + 1)
