"""Two-pass log-probs: differentiable for any upstream gradient.

The forward pass keeps two numbers per row; backward makes each chunk's logits again. That is a
fourth product: use `weighted_nll` or a divergence where the loss is one.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadistill.head.checks import check_hidden, check_ids
from megadistill.head.gradients import GradientSums
from megadistill.head.projection import project, row_blocks
from megadistill.head.rows import RowStatistics, locate
from megadistill.head.score import sweep_statistics
from megadistill.head.vocabulary import VocabularyHead


def logprobs(
    head: VocabularyHead, hidden_TD: Tensor, ids_TK: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities `[T, K]` at global ids, with gradient; ids of a row may repeat."""
    check_hidden(head, hidden_TD, temperature)
    check_ids(head, hidden_TD, ids_TK)
    logprobs_TK: Tensor = _Logprobs.apply(  # type: ignore[no-untyped-call]
        hidden_TD, head.weight_VD, head, ids_TK, temperature
    )
    return logprobs_TK


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch types no context
        hidden_TD: Tensor,
        weight_VD: Tensor,
        head: VocabularyHead,
        ids_TK: Tensor,
        temperature: float,
    ) -> Tensor:
        sweep = sweep_statistics(head, hidden_TD, ids_TK, temperature=temperature)
        ctx.save_for_backward(hidden_TD, ids_TK)
        ctx.head, ctx.total, ctx.temperature = head, sweep.total, temperature
        return sweep.total.logprobs(sweep.picked_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_TK: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, ids_TK = ctx.saved_tensors
        sums = GradientSums.start(
            ctx.head,
            hidden_TD,
            for_hidden=ctx.needs_input_grad[0],
            for_weight=ctx.needs_input_grad[1],
        )
        _sweep(ctx, hidden_TD, ids_TK, upstream_TK, sums)
        return *sums.hand_out(ctx.head), *(None,) * 3


def _sweep(
    ctx: Any, hidden_TD: Tensor, ids_TK: Tensor, upstream_TK: Tensor, sums: GradientSums
) -> None:
    """Make the logits again; turn them into `onehot @ slopes - sum(slopes) softmax`; add to sums."""
    head: VocabularyHead = ctx.head
    total: RowStatistics = ctx.total
    slopes_TK = upstream_TK / ctx.temperature
    chunks = head.chunks(hidden_TD.shape[0])
    logits = hidden_TD.new_empty(chunks[0].stop, head.num_true_rows, dtype=head.compute_dtype)
    tiles = sums.tile(logits, head)
    logsumexp_T1 = total.logsumexp[:, None]
    negative_T1 = -slopes_TK.sum(-1, keepdim=True)
    for rows in chunks:
        size = rows.stop - rows.start
        z_CV, tile_CV = logits[:size], tiles[:size]
        project(hidden_TD[rows], head.true_weight, ctx.temperature, z_CV)
        for block in row_blocks(z_CV):
            z_CV[block].sub_(logsumexp_T1[rows][block]).exp_().mul_(negative_T1[rows][block])
        if head.num_true_rows:
            columns_CK, owned_CK = locate(head, ids_TK[rows])
            z_CV.scatter_add_(1, columns_CK, slopes_TK[rows].masked_fill(~owned_CK, 0.0))
        if tiles is not logits:
            tile_CV.copy_(z_CV)
        sums.add(head, hidden_TD, rows, tile_CV)
