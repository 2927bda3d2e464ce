"""The Triton backend, for Hopper: cuBLAS products, and one kernel for each pass over a chunk.

Why not one kernel that multiplies and normalises? The gradient needs every row's sum before its
first entry, so either the logits are kept for a moment or there is a fourth product. At T = 32768,
D = 4096, V = 151936 and 790 TFLOP/s three products take 155 ms; writing fp32 logits hides behind
the product that makes them, and the two further reads and the bf16 write of this design move 50 GB,
some 12 ms. A fourth product is 52 ms. Scoring needs no second read: with 20 GB, some 5 ms, on top
of 52, a fused kernel would have to come within a tenth of cuBLAS' rate to win. All of this is
modelled, none of it measured yet.

The bf16 tile is written into the memory of its logits, packed to the front of each row, which cuBLAS
reads with the row stride that remains. The memory saved goes into longer chunks, because every chunk
reads and writes the whole fp32 weight gradient once more.

Liger's kernels are no backend here: their interface has neither row weights known beforehand (one
pass), nor fp32 weight gradients, nor divergences over a sharded vocabulary. They are baselines.
"""

import torch
import triton
from torch import Tensor
from torch.distributed import ProcessGroup

from megadistill.head import triton_kernels as kernels
from megadistill.head.backend import Divergence
from megadistill.head.rows import RowStatistics, combine, sum_ranks

MOST_COLUMNS = 4096
NUM_WARPS = 8
_KINDS = {
    "forward_kl": kernels.FORWARD_KL.value,
    "reverse_kl": kernels.REVERSE_KL.value,
    "jsd": kernels.JSD.value,
}


def make_tile(logits_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """The front of each row of the logits' own memory."""
    return logits_CV.view(dtype)[:, : logits_CV.shape[1]]


def statistics(logits_CV: Tensor, *, with_entropy: bool) -> RowStatistics:
    """This shard's statistics, in one read."""
    num_rows, num_columns = logits_CV.shape
    maximum_C, sum_exp_C, sum_shifted_C = logits_CV.new_empty(3, num_rows)
    kernels.statistics_kernel[(num_rows,)](
        logits_CV,
        logits_CV.stride(0),
        num_columns,
        maximum_C,
        sum_exp_C,
        sum_shifted_C,
        # Far below any logit, and finite: the combination of ranks stays free of inf - inf.
        LOWEST=torch.finfo(logits_CV.dtype).min / 4,
        WITH_ENTROPY=with_entropy,
        **_shape(num_columns),
    )
    return RowStatistics(
        maximum_C=maximum_C,
        sum_exp_C=sum_exp_C,
        sum_shifted_C=sum_shifted_C if with_entropy else None,
    )


def soften(
    logits_CV: Tensor, tile_CV: Tensor, group: ProcessGroup | None
) -> tuple[RowStatistics, Tensor]:
    """One read for the statistics, one for the soft-max; no factor stays outside the tile."""
    total = combine(statistics(logits_CV, with_entropy=True), group)
    ones_C = torch.ones_like(total.sum_exp_C)
    softmax_tile(logits_CV, tile_CV, total, ones_C)
    return total, ones_C


def softmax_tile(logits_CV: Tensor, tile_CV: Tensor, total: RowStatistics, scale_C: Tensor) -> None:
    """Soft-max from known statistics: one read and one write."""
    num_rows, num_columns = logits_CV.shape
    kernels.softmax_kernel[(num_rows,)](
        logits_CV,
        logits_CV.stride(0),
        tile_CV,
        tile_CV.stride(0),
        num_columns,
        total.maximum_C,
        scale_C / total.sum_exp_C,
        **_shape(num_columns),
    )


def divergence(
    kind: Divergence,
    logits: tuple[Tensor, Tensor],
    tile_CV: Tensor | None,
    group: ProcessGroup | None,
) -> Tensor:
    """A read of both logits each for their statistics, the values, and the gradient."""
    student_CV, teacher_CV = logits
    num_rows, num_columns = student_CV.shape
    columns: list[Tensor] = []
    for logits_CV in logits:
        total = combine(statistics(logits_CV, with_entropy=False), group)
        columns += [total.maximum_C, total.log_sum]
    values_C2 = student_CV.new_empty(num_rows, 2)
    inputs = (
        student_CV,
        student_CV.stride(0),
        teacher_CV,
        teacher_CV.stride(0),
        num_columns,
        torch.stack(columns, -1),
        values_C2,
    )
    options = {"KIND": _KINDS[kind.name], "BETA": kind.beta, **_shape(num_columns)}
    kernels.divergence_values_kernel[(num_rows,)](*inputs, **options)
    sum_ranks(values_C2, group)
    if tile_CV is not None:
        kernels.divergence_tile_kernel[(num_rows,)](*inputs, tile_CV, tile_CV.stride(0), **options)
    return values_C2[:, 0]


def _shape(num_columns: int) -> dict[str, int]:
    """Columns and warps of a program: 16 KB of fp32 in flight, or less for a small vocabulary."""
    block = min(MOST_COLUMNS, max(triton.next_power_of_2(num_columns), 32))
    return {"BLOCK": block, "num_warps": NUM_WARPS}
