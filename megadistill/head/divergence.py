"""Full-vocabulary divergences between two heads, as values and as one-pass differentiable sums.

Student and teacher arrive as (head, hidden): both distributions of a chunk are made, compared and
dropped, so a teacher ships hidden states and never logits. With S the student's and T the teacher's
probabilities, each divergence has the gradient S (g - sum S g) on the student's logits, for

    forward KL(T || S)                                 S g = -T
    reverse KL(S || T)                                 S g = S log(S / T)
    JSD = b KL(T || M) + (1-b) KL(S || M)              S g = (1-b) S log(S / M)

where M = b T + (1-b) S. A row's gradient depends on that row alone: it is made in the same sweep.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadistill.head.alignment import align
from megadistill.head.checks import check_hidden, check_pair, check_weights
from megadistill.head.gradients import GradientSums
from megadistill.head.projection import project, row_blocks
from megadistill.head.rows import RowStatistics, combine, exponentiate, sum_ranks
from megadistill.head.vocabulary import VocabularyHead


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergences:
    """Per row, in nats, equal on every rank, without gradient."""

    forward_kl_T: Tensor
    """KL(teacher || student)."""
    reverse_kl_T: Tensor
    """KL(student || teacher)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    """One block's share of a divergence, from log-probs of student and teacher."""

    value_C: Tensor
    baseline_C: Tensor
    """Sum of S g over this rank's ids."""
    slope_CV: Tensor
    """S g."""
    student_CV: Tensor
    """S."""


_Kind = Callable[[Tensor, Tensor], _Terms]


def _forward_terms(student_CV: Tensor, teacher_CV: Tensor) -> _Terms:
    probs_CV = teacher_CV.exp()
    value_C = (teacher_CV - student_CV).mul_(probs_CV).sum(-1)
    slope_CV = probs_CV.neg_()
    return _Terms(
        value_C=value_C,
        baseline_C=slope_CV.sum(-1),
        slope_CV=slope_CV,
        student_CV=student_CV.exp(),
    )


def _reverse_terms(student_CV: Tensor, teacher_CV: Tensor) -> _Terms:
    probs_CV = student_CV.exp()
    slope_CV = (student_CV - teacher_CV).mul_(probs_CV)
    value_C = slope_CV.sum(-1)
    return _Terms(value_C=value_C, baseline_C=value_C, slope_CV=slope_CV, student_CV=probs_CV)


def _jsd_terms(student_CV: Tensor, teacher_CV: Tensor, *, beta: float) -> _Terms:
    probs_CV, teacher_probs_CV = student_CV.exp(), teacher_CV.exp()
    mixture_CV = torch.lerp(probs_CV, teacher_probs_CV, beta)
    # Where both probabilities underflow their terms are zero, if only the logarithm is finite.
    mixture_CV.clamp_(min=torch.finfo(mixture_CV.dtype).tiny).log_()
    slope_CV = (student_CV - mixture_CV).mul_(probs_CV).mul_(1.0 - beta)
    baseline_C = slope_CV.sum(-1)
    teacher_kl_C = torch.sub(teacher_CV, mixture_CV, out=mixture_CV).mul_(teacher_probs_CV).sum(-1)
    return _Terms(
        value_C=baseline_C + beta * teacher_kl_C,
        baseline_C=baseline_C,
        slope_CV=slope_CV,
        student_CV=probs_CV,
    )


@torch.no_grad()
def divergences(
    student_head: VocabularyHead,
    student_hidden_TD: Tensor,
    teacher_head: VocabularyHead,
    teacher_hidden_TD: Tensor,
    *,
    temperature: float = 1.0,
) -> Divergences:
    """Both KL divergences of every row over the full vocabulary; two products, no gradient.

    The heads may differ in hidden size, type and padding, not in vocabulary and group.
    """
    pair = _Pair.checked(
        student_head, student_hidden_TD, teacher_head, teacher_hidden_TD, temperature
    )
    num_tokens = student_hidden_TD.shape[0]
    values_T2 = student_hidden_TD.new_zeros(num_tokens, 2, dtype=student_head.compute_dtype)
    logits = pair.buffers()
    for rows in pair.student.chunks(num_tokens):
        values_C2 = values_T2[rows]
        for block, a, b in pair.logprobs(rows, logits):
            values_C2[block, 0] = _forward_terms(a, b).value_C
            values_C2[block, 1] = _reverse_terms(a, b).value_C
    sum_ranks(values_T2, student_head.group)
    return Divergences(forward_kl_T=values_T2[:, 0], reverse_kl_T=values_T2[:, 1])


def forward_kl(
    student_head: VocabularyHead,
    student_hidden_TD: Tensor,
    teacher_head: VocabularyHead,
    teacher_hidden_TD: Tensor,
    weights_T: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`sum_t weights_t KL(teacher || student)_t` with gradient for the student, and its rows."""
    pair = _Pair.checked(
        student_head, student_hidden_TD, teacher_head, teacher_hidden_TD, temperature
    )
    return _weighted_sum(pair, weights_T, _forward_terms)


def reverse_kl(
    student_head: VocabularyHead,
    student_hidden_TD: Tensor,
    teacher_head: VocabularyHead,
    teacher_hidden_TD: Tensor,
    weights_T: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`sum_t weights_t KL(student || teacher)_t` with gradient for the student, and its rows."""
    pair = _Pair.checked(
        student_head, student_hidden_TD, teacher_head, teacher_hidden_TD, temperature
    )
    return _weighted_sum(pair, weights_T, _reverse_terms)


def jsd(  # noqa: PLR0913 - the arguments of the other two, and beta
    student_head: VocabularyHead,
    student_hidden_TD: Tensor,
    teacher_head: VocabularyHead,
    teacher_hidden_TD: Tensor,
    weights_T: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`sum_t weights_t JSD_beta(teacher, student)_t` with gradient for the student, and its rows.

    JSD_beta = beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(
            f"beta must be strictly between 0 and 1, found {beta}; "
            "use forward_kl or reverse_kl for the limits"
        )
    pair = _Pair.checked(
        student_head, student_hidden_TD, teacher_head, teacher_hidden_TD, temperature
    )
    return _weighted_sum(pair, weights_T, partial(_jsd_terms, beta=beta))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """Two heads cut alike, their rows, and the one temperature of both."""

    student: VocabularyHead
    student_hidden_TD: Tensor
    teacher: VocabularyHead
    teacher_hidden_TD: Tensor
    temperature: float

    @classmethod
    def checked(
        cls,
        student: VocabularyHead,
        student_hidden_TD: Tensor,
        teacher: VocabularyHead,
        teacher_hidden_TD: Tensor,
        temperature: float,
    ) -> "_Pair":
        check_hidden(student, student_hidden_TD, temperature)
        check_hidden(teacher, teacher_hidden_TD, temperature)
        check_pair(student, student_hidden_TD, teacher, teacher_hidden_TD)
        return cls(
            student=student,
            student_hidden_TD=student_hidden_TD,
            teacher=align(teacher, student.weight_VD.shape[0]),
            teacher_hidden_TD=teacher_hidden_TD.detach(),
            temperature=temperature,
        )

    def buffers(self) -> tuple[Tensor, Tensor]:
        """Working memory for one chunk of logits of each head."""
        size = self.student.chunks(self.student_hidden_TD.shape[0])[0].stop
        shape = size, self.student.num_true_rows
        return (
            self.student_hidden_TD.new_empty(shape, dtype=self.student.compute_dtype),
            self.student_hidden_TD.new_empty(shape, dtype=self.teacher.compute_dtype),
        )

    def logprobs(
        self, rows: slice, logits: tuple[Tensor, Tensor]
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Log-probabilities of one chunk over this rank's ids, for student and teacher.

        Block by block, as views of `logits` made when they are asked for: still in cache.
        """
        hidden = self.student_hidden_TD.detach(), self.teacher_hidden_TD
        student_CV, teacher_CV = (buffer[: rows.stop - rows.start] for buffer in logits)
        totals: list[RowStatistics] = []
        for head, hidden_TD, z_CV in zip(
            (self.student, self.teacher), hidden, (student_CV, teacher_CV), strict=True
        ):
            project(hidden_TD[rows], head.true_weight, self.temperature, z_CV)
            totals.append(combine(exponentiate(z_CV, keep_logits=True), head.group))
        student, teacher = totals
        for block in row_blocks(student_CV):
            a = student.normalise_(student_CV[block], block)
            b = teacher.normalise_(teacher_CV[block], block)
            yield block, a, b


def _weighted_sum(pair: _Pair, weights_T: Tensor, kind: _Kind) -> tuple[Tensor, Tensor]:
    check_weights(pair.student_hidden_TD, weights_T)
    loss, values_T = _WeightedDivergence.apply(  # type: ignore[no-untyped-call]
        pair.student_hidden_TD,
        pair.student.weight_VD,
        pair,
        weights_T,
        kind,
        torch.is_grad_enabled(),
    )
    return loss, values_T


class _WeightedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - autograd passes every input by position
        ctx: Any,  # torch types no context
        hidden_TD: Tensor,
        weight_VD: Tensor,
        pair: _Pair,
        weights_T: Tensor,
        kind: _Kind,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        sums = GradientSums.start(
            pair.student,
            hidden_TD,
            for_hidden=wants_gradient and ctx.needs_input_grad[0],
            for_weight=wants_gradient and ctx.needs_input_grad[1],
        )
        weights_T = weights_T.to(pair.student.compute_dtype)
        values_T = _sweep(pair, weights_T, kind, sums)
        sums.keep(ctx)
        ctx.head = pair.student
        ctx.mark_non_differentiable(values_T)
        loss = (weights_T * values_T).sum(dtype=torch.float64).to(weights_T.dtype)
        return loss, values_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *GradientSums.kept(ctx).hand_out(ctx.head, upstream), *(None,) * 4


def _sweep(pair: _Pair, weights_T: Tensor, kind: _Kind, sums: GradientSums) -> Tensor:
    """Visit all rows once: the divergence of each, and the gradients added to `sums`."""
    head, hidden_TD = pair.student, pair.student_hidden_TD
    values_T2 = weights_T.new_empty(weights_T.shape[0], 2)
    logits = pair.buffers()
    tiles = sums.tile(logits[0], head)
    for rows in head.chunks(weights_T.shape[0]):
        totals_C2 = values_T2[rows]
        for block, a, b in pair.logprobs(rows, logits):
            terms = kind(a, b)
            totals_C2[block, 0], totals_C2[block, 1] = terms.value_C, terms.baseline_C
            if sums.wanted:
                a.copy_(terms.slope_CV)
                b.copy_(terms.student_CV)
        sum_ranks(totals_C2, head.group)
        if not sums.wanted:
            continue
        slope_CV, probs_CV, tile_CV = (x[: rows.stop - rows.start] for x in (*logits, tiles))
        for block in row_blocks(tile_CV):
            probs_CV[block] *= totals_C2[block, 1:]
            torch.sub(slope_CV[block], probs_CV[block], out=tile_CV[block])
        sums.add(head, hidden_TD, rows, tile_CV, weights_T[rows] / pair.temperature)
    return values_T2[:, 0].clone()
