"""Every layout against Hugging Face in fp32, and against itself after a checkpoint.

All in one file: a file's tests run in one process, which starts each world once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadistill.config.schema import Precision
from tests.megatron import resuming
from tests.megatron.jobs import LAYOUTS, PARITY, RESUMING, run_jobs, world_size
from tests.megatron.worlds import run_world

Measured = Callable[[int], dict[str, Any]]

pytestmark = [pytest.mark.megatron, pytest.mark.multi, pytest.mark.timeout(600)]

LIMITS = {
    "logprob": 1e-5,
    "entropy": 1e-5,
    "top k": 1e-5,
    "top-k kl": 1e-5,
    "teacher entropy": 1e-5,
    "teacher at ids": 1e-5,
    "own top-k": 1e-5,
    "jsd": 1e-5,
    "jsd gradient": 1e-5,
    "gap to itself": 0.0,
    "kl to itself": 0.0,
    "round trip": 0.0,
    "sketch": 1e-5,
    "rows": 0.0,
    "loss": 1e-5,
    "gradient": 1e-5,
    "grad norm": 1e-5,
    # Adam divides by the gradient's size: rounding shows where a gradient is tiny.
    "weights": 2e-4,
    "last loss": 1e-5,
}


@pytest.fixture(scope="module")
def measured(models: Path) -> Measured:
    """What the world of a size measured in all its jobs; it is started when first asked for."""
    found: dict[int, dict[str, Any]] = {}

    def of_size(size: int) -> dict[str, Any]:
        if size not in found:
            found[size] = run_world(run_jobs, size, size, models, timeout_s=560)
        return found[size]

    return of_size


@pytest.mark.parametrize(("name", "model"), PARITY)
def test_engine_agrees_with_hugging_face(name: str, model: str, measured: Measured) -> None:
    found = measured(world_size(LAYOUTS[name][0]))["parity"][name, model]
    too_large = {what: gap for what, gap in found.items() if not gap <= LIMITS[what]}
    assert not too_large
    assert found.keys() == LIMITS.keys()


def test_the_selection_does_not_depend_on_the_number_of_ranks(measured: Measured) -> None:
    """T1-9: every rank selects alike, and two ranks as one."""
    selected, weights = measured(1)["selection"]
    assert 0 < len(selected) < 6
    found, other = measured(2)["selection"]
    assert found == selected
    for one, two in zip(weights, other, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_a_rank_without_rows_takes_part_in_an_overlapped_reduction(measured: Measured) -> None:
    """On a GPU gradients are reduced beside the backward pass, once every weight has its own."""
    found = measured(2)["overlapped"]
    np.testing.assert_allclose(found[True], found[False], rtol=1e-5, atol=1e-7)
    losses = np.array(found[True])[:, 0]
    assert (losses[::2] != 0).all()
    assert (losses[1::2] == 0).all(), "no sample has a teacher"


def gaps_of(measured: Measured, model: str, precision: Precision) -> list[dict[str, float]]:
    """Gaps of each layout of the job; the first is the layout that saved."""
    found: dict[tuple[str, Precision], list[dict[str, float]]] = measured(4)["resuming"]
    return found[model, precision]


@pytest.mark.parametrize(("model", "precision"), [job[:2] for job in RESUMING])
def test_same_layout_goes_on_bit_for_bit(
    model: str, precision: Precision, measured: Measured
) -> None:
    assert gaps_of(measured, model, precision)[0] == {"weights": 0.0, "losses": 0.0, "final": 0.0}


@pytest.mark.parametrize("model", ["qwen2_tied", "qwen3_untied"])
def test_other_layouts_go_on_to_rounding(model: str, measured: Measured, models: Path) -> None:
    others = gaps_of(measured, model, "fp32")[1:]
    others.append(resuming.load_and_go_on(models, model, "fp32", {}))
    assert [other["weights"] for other in others] == [0.0] * len(others)
    assert max(other["losses"] for other in others) <= 1e-6
    assert max(other["final"] for other in others) <= 2e-6
