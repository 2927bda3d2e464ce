"""The matrix products of the head: logits of one chunk, and the two gradients from a tile.

Statistics must come from logits that were never rounded to bf16 (that costs 2e-3 in a log-prob).
A GPU multiplies bf16 into fp32 directly. A CPU has no such product, so W is upcast block by block
and multiplied as fp32; oneDNN is then allowed to round its *inputs* to bf16, which is exact here
because they were bf16, and which uses the CPU's bf16 units where it has them.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

# Rows of W upcast or multiplied at a time: a block of 2048 rows stays in the CPU's cache.
CPU_BLOCK_ROWS = 2048
# Elements of a tile worked on between two reads of memory: 4 MB of fp32, and few GPU launches.
CPU_BLOCK_ELEMENTS = 2**20
GPU_BLOCK_ELEMENTS = 2**26


@contextmanager
def _bf16_inputs_are_exact() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set up by torch at import
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def is_narrow(weight_VD: Tensor) -> bool:
    """Whether tiles must be cast down to the weight's type before the gradient products."""
    return weight_VD.dtype in (torch.bfloat16, torch.float16)


def row_blocks(tile_CV: Tensor) -> list[slice]:
    """Split a tile's rows so that a few element-wise passes over a block stay in cache."""
    elements = GPU_BLOCK_ELEMENTS if tile_CV.is_cuda else CPU_BLOCK_ELEMENTS
    num_rows, num_columns = tile_CV.shape
    size = max(1, elements // max(num_columns, 1))
    return [slice(s, min(s + size, num_rows)) for s in range(0, num_rows, size)]


def project(hidden_CD: Tensor, weight_VD: Tensor, temperature: float, out_CV: Tensor) -> Tensor:
    """Write `hidden @ weight.T / temperature` to `out_CV`, in fp32 (or fp64) throughout."""
    if not is_narrow(weight_VD):
        torch.mm(hidden_CD, weight_VD.t(), out=out_CV)
    elif weight_VD.is_cuda:
        torch.mm(hidden_CD, weight_VD.t(), out_dtype=torch.float32, out=out_CV)
    else:
        _project_upcast(hidden_CD, weight_VD, out_CV)
    return out_CV if temperature == 1.0 else out_CV.mul_(1.0 / temperature)


def _project_upcast(hidden_CD: Tensor, weight_VD: Tensor, out_CV: Tensor) -> None:
    hidden_CD = hidden_CD.float()
    block_VD = torch.empty(CPU_BLOCK_ROWS, weight_VD.shape[1])
    exact = weight_VD.dtype == torch.bfloat16
    with _bf16_inputs_are_exact() if exact else nullcontext():
        for start in range(0, weight_VD.shape[0], CPU_BLOCK_ROWS):
            rows = weight_VD[start : start + CPU_BLOCK_ROWS]
            upcast = block_VD[: rows.shape[0]].copy_(rows)
            torch.mm(hidden_CD, upcast.t(), out=out_CV[:, start : start + rows.shape[0]])


def hidden_gradient(tile_CV: Tensor, weight_VD: Tensor) -> Tensor:
    """`tile @ weight`, the sum over this rank's vocabulary, accumulated in fp32."""
    if is_narrow(weight_VD) and weight_VD.is_cuda:
        return torch.mm(tile_CV, weight_VD, out_dtype=torch.float32)
    return torch.mm(tile_CV, weight_VD).to(torch.promote_types(tile_CV.dtype, torch.float32))


def add_weight_gradient(gradient_VD: Tensor, tile_CV: Tensor, hidden_CD: Tensor) -> None:
    """Add `tile.T @ hidden` to the wide accumulator `gradient_VD`."""
    if not is_narrow(tile_CV):
        gradient_VD.addmm_(tile_CV.t(), hidden_CD)
    elif tile_CV.is_cuda:
        torch.addmm(gradient_VD, tile_CV.t(), hidden_CD, out_dtype=torch.float32, out=gradient_VD)
    else:
        for start in range(0, tile_CV.shape[1], CPU_BLOCK_ROWS):
            block = slice(start, start + CPU_BLOCK_ROWS)
            gradient_VD[block] += torch.mm(tile_CV[:, block].t(), hidden_CD)
