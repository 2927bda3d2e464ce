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

from megadistill.head.backend import backend_of
from megadistill.head.checks import check_hidden, check_targets, check_weights
from megadistill.head.gradients import GradientSums
from megadistill.head.projection import project
from megadistill.head.rows import pick, place, sum_ranks
from megadistill.head.score import sweep_statistics
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
        if sums.wanted:
            logprobs_T, entropy_T = _sweep(head, hidden_TD, targets_T, weights_T, temperature, sums)
        else:
            sweep = sweep_statistics(
                head, hidden_TD, targets_T[:, None], temperature=temperature, with_entropy=True
            )
            logprobs_T = sweep.total.logprobs(sweep.picked_TK).squeeze(1)
            entropy_T = sweep.total.entropy
        sums.keep(ctx, head)
        ctx.mark_non_differentiable(logprobs_T, entropy_T)
        loss = -(weights_T * logprobs_T).sum(dtype=torch.float64).to(weights_T.dtype)
        return loss, logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *GradientSums.kept(ctx, upstream).hand_out(ctx.head), *(None,) * 5


def _sweep(
    head: VocabularyHead,
    hidden_TD: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    temperature: float,
    sums: GradientSums,
) -> tuple[Tensor, Tensor]:
    """Visit all rows once: log-probs and entropy, and the gradients added to `sums`."""
    backend = backend_of(head)
    logprobs_T, entropy_T = weights_T.new_empty(2, weights_T.shape[0])
    chunks = head.chunks(hidden_TD.shape[0])
    logits = hidden_TD.new_empty(chunks[0].stop, head.num_true_rows, dtype=head.compute_dtype)
    tiles = backend.make_tile(logits, head.weight_VD.dtype)
    for rows in chunks:
        z_CV, tile_CV = logits[: rows.stop - rows.start], tiles[: rows.stop - rows.start]
        targets_C1 = targets_T[rows, None]
        project(hidden_TD[rows], head.true_weight, temperature, z_CV)
        picked_C1 = sum_ranks(pick(head, z_CV, targets_C1), head.group)
        total, factor_C = backend.soften(z_CV, tile_CV, head.group)
        logprobs_T[rows] = total.logprobs(picked_C1).squeeze(1)
        entropy_T[rows] = total.entropy
        # The target's entry, p - 1 = expm1(log p), is exact where p is close to one.
        place(head, tile_CV, targets_C1, (logprobs_T[rows].expm1() / factor_C)[:, None])
        sums.add(head, hidden_TD, rows, tile_CV, factor_C * weights_T[rows] / temperature)
    return logprobs_T, entropy_T
