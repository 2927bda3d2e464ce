"""A checkpoint goes on as if training had never stopped: bit for bit, and in other layouts."""

from pathlib import Path

import pytest

from megadistill.config.schema import Precision
from megadistill.megatron.engine import Engine
from tests.megatron import resuming
from tests.megatron.ranks import Layout, run_config
from tests.megatron.worlds import run_world

pytestmark = [pytest.mark.megatron, pytest.mark.timeout(600)]

TIED: list[Layout] = [
    {"pp": 2, "dp": 2},
    {"tp": 2, "dp": 2, "sequence_parallel": True},
]
UNTIED: list[Layout] = [{"tp": 2, "pp": 2}, {"dp": 4}]


@pytest.fixture(scope="module")
def gaps(models: Path) -> dict[tuple[str, Precision], list[dict[str, float]]]:
    """Saved by four ranks in the first layout of each list, loaded by them in all its layouts."""
    jobs: list[tuple[str, Precision, list[Layout]]] = [
        ("qwen2_tied", "fp32", TIED),
        ("qwen3_untied", "fp32", UNTIED),
        ("qwen2_tied", "bf16", TIED[:1]),
    ]
    found = run_world(resuming.save_then_load_all, 4, models, jobs, timeout_s=560)
    return dict(zip([(model, precision) for model, precision, _ in jobs], found, strict=True))


@pytest.mark.multi
@pytest.mark.parametrize(
    ("model", "precision"),
    [("qwen2_tied", "fp32"), ("qwen3_untied", "fp32"), ("qwen2_tied", "bf16")],
)
def test_same_layout_goes_on_bit_for_bit(
    model: str,
    precision: Precision,
    gaps: dict[tuple[str, Precision], list[dict[str, float]]],
) -> None:
    assert gaps[model, precision][0] == {"weights": 0.0, "losses": 0.0, "final": 0.0}


@pytest.mark.multi
@pytest.mark.parametrize("model", ["qwen2_tied", "qwen3_untied"])
def test_other_layouts_go_on_to_rounding(
    model: str, gaps: dict[tuple[str, Precision], list[dict[str, float]]], models: Path
) -> None:
    others = [*gaps[model, "fp32"][1:], resuming.load_and_go_on(models, model, "fp32", {})]
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
