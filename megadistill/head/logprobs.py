"""Two-pass log-probs: differentiable for any upstream gradient.

The forward pass keeps two numbers per row; backward makes each chunk's logits again. That is a
fourth product: use `weighted_nll` or a divergence where the loss is one.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadistill.head.backend import backend_of
from megadistill.head.checks import check_hidden, check_ids
from megadistill.head.gradients import GradientSums
from megadistill.head.projection import project
from megadistill.head.rows import RowStatistics, place
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
        logprobs_TK = sweep.total.logprobs(sweep.picked_TK)
        ctx.save_for_backward(hidden_TD, ids_TK, logprobs_TK)
        ctx.head, ctx.total, ctx.temperature = head, sweep.total, temperature
        return logprobs_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_TK: Tensor) -> tuple[Tensor | None, ...]:
        sums = GradientSums.start(
            ctx.head,
            ctx.saved_tensors[0],
            for_hidden=ctx.needs_input_grad[0],
            for_weight=ctx.needs_input_grad[1],
        )
        _sweep(ctx, upstream_TK / ctx.temperature, sums)
        return *sums.hand_out(ctx.head), *(None,) * 3


def _sweep(ctx: Any, slopes_TK: Tensor, sums: GradientSums) -> None:
    """Make the logits again and add `onehot @ slopes - sum(slopes) softmax` of every row to sums."""
    head: VocabularyHead = ctx.head
    total: RowStatistics = ctx.total
    hidden_TD, ids_TK, logprobs_TK = ctx.saved_tensors
    backend = backend_of(head)
    chunks = head.chunks(hidden_TD.shape[0])
    logits = hidden_TD.new_empty(chunks[0].stop, head.num_true_rows, dtype=head.compute_dtype)
    tiles = backend.make_tile(logits, head.weight_VD.dtype)
    slope_T = slopes_TK.sum(-1)
    for rows in chunks:
        z_CV, tile_CV = logits[: rows.stop - rows.start], tiles[: rows.stop - rows.start]
        project(hidden_TD[rows], head.true_weight, ctx.temperature, z_CV)
        backend.softmax_tile(z_CV, tile_CV, total.rows(rows), -slope_T[rows])
        entries_CK = _entries(ids_TK[rows], slopes_TK[rows], logprobs_TK[rows])
        place(head, tile_CV, ids_TK[rows], entries_CK)
        sums.add(head, hidden_TD, rows, tile_CV)


def _entries(ids_CK: Tensor, slopes_CK: Tensor, logprobs_CK: Tensor) -> Tensor:
    """The gradient on the logits at the ids: own - p (own + others) = -own expm1(log p) - p others.

    Own is the id's slope, summed over its repeats in the row; nothing cancels where p is close to one.
    """
    own_CK = _summed_over_repeats(ids_CK, slopes_CK)
    others_CK = slopes_CK.sum(-1, keepdim=True) - own_CK
    return -own_CK * logprobs_CK.expm1() - logprobs_CK.exp() * others_CK


def _summed_over_repeats(ids_CK: Tensor, slopes_CK: Tensor) -> Tensor:
    """For every id of a row the sum of the slopes at that id, by sorting the row."""
    sorted_CK, order_CK = ids_CK.sort(-1)
    runs_CK = (sorted_CK.diff(prepend=sorted_CK[:, :1]) != 0).cumsum(-1)
    sums_CK = torch.zeros_like(slopes_CK)
    sums_CK.scatter_add_(1, runs_CK, slopes_CK.gather(1, order_CK))
    return torch.empty_like(slopes_CK).scatter_(1, order_CK, sums_CK.gather(1, runs_CK))
