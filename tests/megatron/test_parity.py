"""Ours against Hugging Face in fp32: scores, losses, gradients and weights, in every layout."""

import numpy as np
import pytest

from tests.megatron.conftest import Measured
from tests.megatron.jobs import LAYOUTS, PARITY, world_size

pytestmark = [pytest.mark.megatron, pytest.mark.multi, pytest.mark.timeout(600)]

LIMITS = {
    "logprob": 1e-5,
    "entropy": 1e-5,
    "top k": 1e-5,
    "top-k kl": 1e-5,
    "gap to itself": 0.0,
    "kl to itself": 0.0,
    "round trip": 0.0,
    "rows": 0.0,
    "loss": 1e-5,
    "gradient": 1e-5,
    "grad norm": 1e-5,
    # Adam divides by the gradient's size: rounding shows where a gradient is tiny.
    "weights": 2e-4,
    "last loss": 1e-5,
}


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
