"""One-pass weighted negative log-likelihood: policy gradient and cross-entropy in one function.

With frozen row weights a row's gradient on its logits, w (softmax - onehot) / temperature, is known
as soon as the row's statistics are. Both gradients are therefore made in the forward sweep, while
the tile of probabilities exists: three products in all, where recomputing in backward needs four.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadistill.head.checks import check_hidden, check_targets, check_weights
from megadistill.head.gradients import GradientSums
from megadistill.head.projection import project
from megadistill.head.rows import RowStatistics, combine, exponentiate, locate, pick, sum_ranks
from megadistill.head.vocabulary import VocabularyHead


@dataclass(frozen=True, slots=True, kw_only=True)
class NllStatistics:
    """What the sweep saw, per row, equal on every rank, without gradient."""

    logprobs_T: Tensor
    """Log-probability of each row's target."""
    entropy_T: Tensor
    """Entropy of each row's distribution, in nats."""


def weighted_nll(
    head: VocabularyHead,
    hidden_TD: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, NllStatistics]:
    """`-sum_t weights_t log softmax(hidden_t @ weight.T / temperature)[targets_t]`, and statistics.

    The sum has gradients with respect to `hidden_TD` and `head.weight_VD`. Weights are frozen:
    they hold everything that multiplies a token's term (mask, advantage, normaliser).
    """
    check_hidden(head, hidden_TD, temperature)
    check_targets(head, hidden_TD, targets_T)
    check_weights(hidden_TD, weights_T)
    loss, logprobs_T, entropy_T = _WeightedNll.apply(  # type: ignore[no-untyped-call]
        hidden_TD, head.weight_VD, head, targets_T, weights_T, temperature, torch.is_grad_enabled()
    )
    return loss, NllStatistics(logprobs_T=logprobs_T, entropy_T=entropy_T)


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - autograd passes every input by position
        ctx: Any,  # torch types no context
        hidden_TD: Tensor,
        weight_VD: Tensor,
        head: VocabularyHead,
        targets_T: Tensor,
        weights_T: Tensor,
        temperature: float,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = GradientSums.start(
            head,
            hidden_TD,
            for_hidden=wants_gradient and ctx.needs_input_grad[0],
            for_weight=wants_gradient and ctx.needs_input_grad[1],
        )
        weights_T = weights_T.to(head.compute_dtype)
        logprobs_T, entropy_T = _sweep(head, hidden_TD, targets_T, weights_T, temperature, sums)
        sums.keep(ctx)
        ctx.head = head
        ctx.mark_non_differentiable(logprobs_T, entropy_T)
        loss = -(weights_T * logprobs_T).sum(dtype=torch.float64).to(weights_T.dtype)
        return loss, logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *GradientSums.kept(ctx).hand_out(ctx.head, upstream), *(None,) * 5


def _sweep(
    head: VocabularyHead,
    hidden_TD: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    temperature: float,
    sums: GradientSums,
) -> tuple[Tensor, Tensor]:
    """Visit all rows once: log-probs and entropy, and the gradients added to `sums`."""
    logprobs_T, entropy_T = weights_T.new_empty(2, weights_T.shape[0])
    chunks = head.chunks(hidden_TD.shape[0])
    logits = hidden_TD.new_empty(chunks[0].stop, head.num_true_rows, dtype=head.compute_dtype)
    tiles = sums.tile(logits, head)
    for rows in chunks:
        z_CV, tile_CV = logits[: rows.stop - rows.start], tiles[: rows.stop - rows.start]
        targets_C1 = targets_T[rows, None]
        project(hidden_TD[rows], head.true_weight, temperature, z_CV)
        picked_C1 = sum_ranks(pick(head, z_CV, targets_C1), head.group)
        narrow_CV = None if tiles is logits else tile_CV
        local = exponentiate(z_CV, with_entropy=True, tile_CV=narrow_CV)
        total = combine(local, head.group)
        logprobs_T[rows] = total.logprobs(picked_C1).squeeze(1)
        entropy_T[rows] = total.entropy
        if not sums.wanted:
            continue
        scale_C = _subtract_targets(head, tile_CV, targets_C1, logprobs_T[rows], (local, total))
        sums.add(head, hidden_TD, rows, tile_CV, scale_C * weights_T[rows] / temperature)
    return logprobs_T, entropy_T


def _subtract_targets(
    head: VocabularyHead,
    tile_CV: Tensor,
    targets_C1: Tensor,
    logprobs_C: Tensor,
    statistics: tuple[RowStatistics, RowStatistics],
) -> Tensor:
    """Make the tile of exponentials proportional to softmax - onehot; return the row factors.

    The target's entry is expm1(log p), exact where p is close to one. On one rank the factor
    1 / sum stays outside the tile, which saves a pass. On several ranks a shard may hold almost
    none of a row's mass, its factor may underflow, and the entry could not be divided by it.
    """
    local, total = statistics
    if head.group is None:
        factor_C = total.sum_exp_C.reciprocal()
        entries_C = logprobs_C.expm1() * total.sum_exp_C
    else:
        tile_CV *= ((local.maximum_C - total.maximum_C).exp() / total.sum_exp_C)[:, None]
        factor_C = torch.ones_like(logprobs_C)
        entries_C = logprobs_C.expm1()
    columns_C1, owned_C1 = locate(head, targets_C1)
    owned_rows = owned_C1.squeeze(1).nonzero().squeeze(1)
    tile_CV[owned_rows, columns_C1[owned_rows, 0]] = entries_C[owned_rows].to(tile_CV.dtype)
    return factor_C
