"""A checkpoint goes on as if training had never stopped; several processes: `test_layouts`."""

from pathlib import Path

import pytest

from megadistill.megatron.engine import Engine
from tests.megatron import resuming
from tests.megatron.ranks import run_config

pytestmark = [pytest.mark.megatron, pytest.mark.timeout(600)]


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
