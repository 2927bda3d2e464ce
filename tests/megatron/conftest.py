"""One directory with the small models, and the reference of each, for all tests of the engine."""

from pathlib import Path

import pytest
import torch

from tests.megatron import oracle

LENGTHS = (7, 30, 12, 33, 70, 5)
"""Tokens of the samples: several fit a micro-batch of 48, and one does not fit at all."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    teachers = {
        name: oracle.write_model(case, directory, seed=seed)
        for seed, (name, case) in enumerate(oracle.TEACHERS.items(), start=5)
    }
    for case in oracle.CASES:
        model_dir = oracle.write_model(case, directory)
        reference = oracle.reference(model_dir, LENGTHS, teachers)
        torch.save(reference, directory / f"{case.name}.reference")
    return directory
