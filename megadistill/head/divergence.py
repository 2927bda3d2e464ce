"""Full-vocabulary divergences between two heads, as values and as one-pass differentiable sums.

Student and teacher arrive as (head, hidden): both distributions of a chunk are made, compared and
dropped, so a teacher ships hidden states and never logits. With S the student's and T the teacher's
probabilities, each divergence has the gradient S (g - sum S g) on the student's logits, for

    forward KL(T || S)                                 S g = -T
    reverse KL(S || T)                                 S g = S log(S / T)
    JSD = b KL(T || M) + (1-b) KL(S || M)              S g = (1-b) S log(S / M)

where M = b T + (1-b) S. A row's gradient depends on that row alone: it is made in the same sweep.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadistill.head.alignment import align
from megadistill.head.backend import Divergence, backend_of
from megadistill.head.checks import check_hidden, check_pair, check_weights
from megadistill.head.gradients import GradientSums
from megadistill.head.projection import project
from megadistill.head.vocabulary import VocabularyHead

FORWARD_KL = Divergence(name="forward_kl")
REVERSE_KL = Divergence(name="reverse_kl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergences:
    """Per row, in nats, equal on every rank, without gradient."""

    forward_kl_T: Tensor
    """KL(teacher || student)."""
    reverse_kl_T: Tensor
    """KL(student || teacher)."""


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
    values_T2 = student_hidden_TD.new_empty(
        student_hidden_TD.shape[0], 2, dtype=student_head.compute_dtype
    )
    backend, buffers = backend_of(student_head), pair.buffers()
    for rows in pair.rows():
        logits = pair.project(rows, buffers)
        for column, kind in enumerate((FORWARD_KL, REVERSE_KL)):
            values_T2[rows, column] = backend.divergence(kind, logits, None, student_head.group)
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
    return _weighted_sum(pair, weights_T, FORWARD_KL)


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
    return _weighted_sum(pair, weights_T, REVERSE_KL)


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
    return _weighted_sum(pair, weights_T, Divergence(name="jsd", beta=beta))


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

    def rows(self) -> list[slice]:
        """The chunks of one sweep."""
        return self.student.chunks(self.student_hidden_TD.shape[0], num_heads=2)

    def buffers(self) -> tuple[Tensor, Tensor]:
        """Memory for one chunk of logits of each head, over this rank's ids."""
        shape = self.rows()[0].stop, self.student.num_true_rows
        return (
            self.student_hidden_TD.new_empty(shape, dtype=self.student.compute_dtype),
            self.teacher_hidden_TD.new_empty(shape, dtype=self.teacher.compute_dtype),
        )

    def project(self, rows: slice, buffers: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of student and teacher, in the buffers."""
        student_CV, teacher_CV = (buffer[: rows.stop - rows.start] for buffer in buffers)
        student_CD, teacher_CD = self.student_hidden_TD[rows].detach(), self.teacher_hidden_TD[rows]
        return (
            project(student_CD, self.student.true_weight, self.temperature, student_CV),
            project(teacher_CD, self.teacher.true_weight, self.temperature, teacher_CV),
        )


def _weighted_sum(pair: _Pair, weights_T: Tensor, kind: Divergence) -> tuple[Tensor, Tensor]:
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
        kind: Divergence,
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
        sums.keep(ctx, pair.student)
        ctx.mark_non_differentiable(values_T)
        loss = (weights_T * values_T).sum(dtype=torch.float64).to(weights_T.dtype)
        return loss, values_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *GradientSums.kept(ctx, upstream).hand_out(ctx.head), *(None,) * 4


def _sweep(pair: _Pair, weights_T: Tensor, kind: Divergence, sums: GradientSums) -> Tensor:
    """Visit all rows once: the divergence of each, and the gradients added to `sums`."""
    head, backend = pair.student, backend_of(pair.student)
    values_T, buffers = torch.empty_like(weights_T), pair.buffers()
    tiles = backend.make_tile(buffers[0], head.weight_VD.dtype) if sums.wanted else None
    for rows in pair.rows():
        logits = pair.project(rows, buffers)
        tile_CV = None if tiles is None else tiles[: rows.stop - rows.start]
        values_T[rows] = backend.divergence(kind, logits, tile_CV, head.group)
        if tile_CV is not None:
            scale_C = weights_T[rows] / pair.temperature
            sums.add(head, pair.student_hidden_TD, rows, tile_CV, scale_C)
    return values_T
