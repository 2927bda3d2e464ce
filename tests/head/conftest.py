"""Both backends: Triton runs on a GPU where there is one, and in its interpreter otherwise."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of a backend; new tensors lie where it computes."""
    if request.param == "triton":
        pytest.importorskip("triton")
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        yield request.param
