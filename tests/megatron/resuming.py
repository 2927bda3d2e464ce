"""What ranks do to check that a loaded checkpoint goes on as if training had never stopped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.config.schema import Precision
from megadistill.megatron.engine import Engine
from tests.megatron.ranks import Layout, largest_gap, nll, read_reference, run_config, worst
from tests.megatron.worlds import renew_world

EXTRA = {"step": 2, "cursor": {"general": [3, 4]}}


Job = tuple[str, Precision, tuple[Layout, ...]]
"""Model, precision, and layouts: the first saves, all load."""


def save_then_load_all(
    directory: Path, jobs: Sequence[Job]
) -> dict[tuple[str, Precision], list[dict[str, float]]]:
    """For each job, by model and precision, the gaps of every layout from the first."""
    found = {}
    for model_name, precision, layouts in jobs:
        save_and_go_on(directory, model_name, precision, layouts[0])
        found[model_name, precision] = [
            load_and_go_on(directory, model_name, precision, own) for own in layouts
        ]
    return found


def save_and_go_on(directory: Path, model_name: str, precision: Precision, layout: Layout) -> None:
    """Two steps, a checkpoint, two more steps; what they gave is kept beside the checkpoint."""
    engine = Engine(run_config(directory / model_name, layout, precision=precision))
    train(engine, directory, model_name, 2)
    place = directory / f"{model_name}.{precision}.checkpoint"
    # Only rank 0's directory counts.
    engine.save(place if engine.is_writer else directory / "elsewhere", EXTRA)
    kept: dict[str, Any] = {"weights": weights_of(engine)}
    kept["losses"] = train(engine, directory, model_name, 2)
    kept["final"] = weights_of(engine)
    if engine.is_writer:
        torch.save(kept, place / "kept.pt")
    engine.close()
    renew_world()


def load_and_go_on(
    directory: Path, model_name: str, precision: Precision, layout: Layout
) -> dict[str, float]:
    """Largest gaps after loading, and after two more steps, from what `save_and_go_on` kept."""
    place = directory / f"{model_name}.{precision}.checkpoint"
    engine = Engine(run_config(directory / model_name, layout, precision=precision))
    assert engine.load(place) == EXTRA
    kept: dict[str, Any] = torch.load(place / "kept.pt")
    gaps = {"weights": largest_gap(weights_of(engine), kept["weights"])}
    losses = train(engine, directory, model_name, 2)
    gaps["losses"] = max(abs(a - b) for a, b in zip(losses, kept["losses"], strict=True))
    gaps["final"] = largest_gap(weights_of(engine), kept["final"])
    gaps = worst(gaps)
    engine.close()
    renew_world()
    return gaps


def train(engine: Engine, directory: Path, model_name: str, num_steps: int) -> list[float]:
    """Losses of so many steps on the model's samples."""
    samples = read_reference(directory, model_name).samples
    return [engine.step(samples, nll, learning_rate=1e-3).loss for _ in range(num_steps)]


def reference_losses(directory: Path, model_name: str, num_steps: int) -> Any:
    """What Hugging Face's first steps give, to rounding."""
    return pytest.approx(read_reference(directory, model_name).losses[:num_steps], abs=1e-5)


def weights_of(engine: Engine) -> dict[str, Tensor]:
    """Copies of the exported weights, on rank 0."""
    return {name: tensor.clone() for name, tensor in engine.hf_tensors()}
