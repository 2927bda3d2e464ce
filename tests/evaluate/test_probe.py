"""The probe of a real small run, whose student still is its domain teacher."""

import json
from pathlib import Path

import numpy as np
import pytest

from megadistill.collect import Batch
from megadistill.config import RunConfig, load
from megadistill.config.algorithm import CamopdConfig
from megadistill.evaluate import probe
from megadistill.megatron.engine import Engine
from megadistill.report.rollouts import store_rollouts
from megadistill.rundir import RunDir
from megadistill.state import RunState, save
from megadistill.types import TokenSpan
from tests.e2e.small_run import make_models, write_run
from tests.megatron.ranks import scored_by
from tests.tiny import camopd_of

pytestmark = [pytest.mark.megatron, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that was saved after two steps at a learning rate of zero, so to say."""
    folder = tmp_path_factory.mktemp("probe")
    make_models(folder)
    config = load(RunConfig, write_run(folder, "probed"))
    run = RunDir.of(config)
    run.create(config)
    engine = Engine(config)
    save(run, engine, RunState(step=2), keep=1)
    assert isinstance(config.algorithm, CamopdConfig)
    algorithm = camopd_of(config.algorithm)
    ids = np.random.default_rng(0).integers(5, 200, (6, 20), dtype=np.int32)
    spans = [TokenSpan(token_ids_N=row, num_scored=8) for row in ids]
    for step, branch in ((1, "general"), (2, "domain")):
        scored = scored_by(engine, branch, branch, spans)
        batch = Batch(branch=branch, selection=algorithm.select(scored), scored=scored)
        store_rollouts(run.rollout_file(step), batch)
    engine.close()
    return run


def test_a_run_is_probed_from_what_it_left(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    probe.write_probe(run, 5)
    report = json.loads((run.report / "probe-step-000002.json").read_text())
    general, domain = report["branches"]["general"], report["branches"]["domain"]
    assert general["samples"] == domain["samples"] == 5
    assert 0 < general["selected"] < 5
    assert 0 < general["coherence_all"] < general["coherence_selected"] < 1
    assert general["gain_percent"] > general["size_matched_gain_percent"]
    # Equal models: no gradient, and nothing to be coherent.
    (pair,) = report["pairs"]
    assert pair["branches"] == ["general", "domain"]
    assert domain["coherence_all"] == pair["dot"] == 0
    assert domain["gain_percent"] is pair["cosine"] is None
    assert "Gradients after step 2" in capsys.readouterr().out


def test_a_run_without_rollouts_or_checkpoints_cannot_be_probed(
    run: RunDir, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="none of branch domain up to step 1"):
        probe.latest_rollouts(run, "domain", 1)
    other = RunDir(tmp_path)
    other.create(run.load_config())
    with pytest.raises(ValueError, match="no whole checkpoint"):
        probe.probe(other, 4)
