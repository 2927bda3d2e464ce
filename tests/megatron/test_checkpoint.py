"""A checkpoint goes on as if training had never stopped: bit for bit, and in other layouts."""

from pathlib import Path

import pytest

from megadistill.config.schema import Precision
from megadistill.megatron.engine import Engine
from tests.megatron import resuming
from tests.megatron.conftest import Measured
from tests.megatron.jobs import RESUMING
from tests.megatron.ranks import run_config

pytestmark = [pytest.mark.megatron, pytest.mark.timeout(600)]


def gaps_of(measured: Measured, model: str, precision: Precision) -> list[dict[str, float]]:
    """Gaps of each layout of the job; the first is the layout that saved."""
    found: dict[tuple[str, Precision], list[dict[str, float]]] = measured(4)["resuming"]
    return found[model, precision]


@pytest.mark.multi
@pytest.mark.parametrize(("model", "precision"), [job[:2] for job in RESUMING])
def test_same_layout_goes_on_bit_for_bit(
    model: str, precision: Precision, measured: Measured
) -> None:
    assert gaps_of(measured, model, precision)[0] == {"weights": 0.0, "losses": 0.0, "final": 0.0}


@pytest.mark.multi
@pytest.mark.parametrize("model", ["qwen2_tied", "qwen3_untied"])
def test_other_layouts_go_on_to_rounding(model: str, measured: Measured, models: Path) -> None:
    others = gaps_of(measured, model, "fp32")[1:]
    others.append(resuming.load_and_go_on(models, model, "fp32", {}))
    assert [other["weights"] for other in others] == [0.0] * len(others)
    assert max(other["losses"] for other in others) <= 1e-6
    assert max(other["final"] for other in others) <= 2e-6


def test_one_process_goes_on_bit_for_bit(models: Path, tmp_path: Path) -> None:
    for name in ("llama_tied", "llama_tied.reference"):
        (tmp_path / name).symlink_to(models / name)
    resuming.save_and_go_on(tmp_path, "llama_tied", "bf16", {})
    gaps = resuming.load_and_go_on(tmp_path, "llama_tied", "bf16", {})
    assert gaps == {"weights": 0.0, "losses": 0.0, "final": 0.0}


def test_checkpoint_of_an_untrained_engine_loads(models: Path, tmp_path: Path) -> None:
    engine = Engine(run_config(models / "llama_tied", {}))
    engine.save(tmp_path / "start", {"step": 0})
    assert engine.load(tmp_path / "start") == {"step": 0}
    assert resuming.train(engine, models, "llama_tied", 2) == resuming.reference_losses(
        models, "llama_tied", 2
    )
    engine.close()


def test_a_directory_without_checkpoint_is_refused(models: Path, tmp_path: Path) -> None:
    engine = Engine(run_config(models / "llama_tied", {}))
    with pytest.raises(ValueError, match=r"metadata\.json"):
        engine.load(tmp_path)
    engine.close()
