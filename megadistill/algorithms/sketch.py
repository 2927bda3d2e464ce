"""A gradient in few numbers that keeps norms and dot products: CountSketch.

Every entry goes, with a random sign, into one of M buckets; both are fixed by the seed, so that
sketches add like the gradients they stand for. Shape legend: P parameters, M buckets.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NUM_BUCKETS = 2**16
"""Norms and dot products then have a relative error of about half a percent."""

BLOCK = 1 << 24
"""Entries of a tensor that are hashed at once."""


def sketch(gradient: Iterable[Tensor], *, seed: int = 0) -> npt.NDArray[np.float64]:
    """`[M]` of one gradient, given as its tensors in an order that is always the same."""
    total_M = torch.zeros(NUM_BUCKETS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for tensor in gradient:
        for block_P in torch.split(tensor.detach().reshape(-1), BLOCK):
            drawn_P = torch.randint(2 * NUM_BUCKETS, (len(block_P),), generator=generator)
            signs_P = 1.0 - 2.0 * (drawn_P % 2)
            total_M.index_add_(0, drawn_P // 2, signs_P.double() * block_P.cpu().double())
    sketched: npt.NDArray[np.float64] = total_M.numpy()
    return sketched
