"""One directory with the small models, and the reference of each, for all tests of the engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron import oracle
from tests.megatron.jobs import run_jobs
from tests.megatron.worlds import run_world

Measured = Callable[[int], dict[str, Any]]

LENGTHS = (7, 30, 12, 33, 70, 5)
"""Tokens of the samples: several fit a micro-batch of 48, and one does not fit at all."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for case in oracle.CASES:
        model_dir = oracle.write_model(case, directory)
        reference = oracle.reference(model_dir, LENGTHS)
        torch.save(reference, directory / f"{case.name}.reference")
    return directory


@pytest.fixture(scope="session")
def measured(models: Path) -> Measured:
    """What the world of a size measured in all its jobs; it is started when first asked for."""
    found: dict[int, dict[str, Any]] = {}

    def of_size(size: int) -> dict[str, Any]:
        if size not in found:
            found[size] = run_world(run_jobs, size, size, models, timeout_s=560)
        return found[size]

    return of_size
