"""Rows of a micro-batch from dense cases, and what every divergence is by its definition.

Shape suffixes: T rows, K ids, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megadistill.types import MicroBatch, TeacherRows
from tests.head.dense import Case, dense_jsd, dense_kl, dense_logprobs, make_case

NUM_ROWS = 13
STUDENT = make_case(num_tokens=NUM_ROWS)
TEACHERS = {
    "wide": make_case(num_tokens=NUM_ROWS, hidden_size=11, seed=1),
    "narrow": make_case(num_tokens=NUM_ROWS, hidden_size=5, num_padding=0, seed=2),
}
OWNER = ["wide", "narrow", "wide", "wide", "narrow", "", "narrow", *["wide"] * 6]
"""Whose row it is; one is nobody's."""
SILENT = torch.arange(NUM_ROWS) % 4 == 2
"""Rows with a teacher whose divergence has weight 0."""
WEIGHTS_T = make_case(num_tokens=NUM_ROWS, seed=3).weights_T.masked_fill(SILENT, 0.0)
WEIGHTS_T[OWNER.index("")] = 0.0
TOP_K = 5


def bare_rows(case: Case, **fields: Any) -> MicroBatch:
    """The case's rows; what lies around them is the model's business."""
    empty = torch.empty(0, dtype=torch.int64)
    return MicroBatch(
        token_ids_T=empty,
        position_ids_T=empty,
        cu_seqlens=empty,
        rows_W=torch.arange(len(case.targets_T)),
        targets_W=case.targets_T,
        weights_W=case.weights_T,
        sample_ids=(),
        **fields,
    )


def teacher_logprobs(temperature: float = 1.0) -> Tensor:
    """`[T, V]` of each row's own teacher; nobody's row has the first teacher's."""
    by_name = {name: dense_logprobs(case, temperature) for name, case in TEACHERS.items()}
    rows = [by_name[name or "wide"][row] for row, name in enumerate(OWNER)]
    return torch.stack(rows).detach()


def with_teachers(batch: MicroBatch, weights: Mapping[str, Tensor] | None = None) -> MicroBatch:
    """Hidden states of each teacher in its rows; `weights` are the output weights, or a rank's."""
    found = {}
    for name, case in TEACHERS.items():
        rows_S = torch.tensor(
            [row for row, owner in enumerate(OWNER) if owner == name and not SILENT[row]]
        )
        found[name] = TeacherRows(
            rows_S=rows_S,
            hidden_SD=case.hidden_TD.detach()[rows_S],
            weight_VD=case.weight_VD.detach() if weights is None else weights[name],
        )
    return replace(batch, teachers=found, divergence_weights_W=WEIGHTS_T)


def with_support(batch: MicroBatch, *, side: str, temperature: float, size: int) -> MicroBatch:
    """The most probable ids of teacher or student, with the teacher's log-probabilities there."""
    teacher_TV = teacher_logprobs(temperature)
    chooser_TV = teacher_TV if side == "teacher" else dense_logprobs(STUDENT).detach()
    ids_TK = chooser_TV.topk(size).indices
    return replace(
        batch,
        divergence_weights_W=WEIGHTS_T,
        top_ids_WK=ids_TK,
        top_logprobs_WK=teacher_TV.gather(1, ids_TK),
    )


def dense_full(divergence: str, beta: float, temperature: float) -> Tensor:
    """Per row, with gradient for the student."""
    student_TV, teacher_TV = dense_logprobs(STUDENT, temperature), teacher_logprobs(temperature)
    if divergence == "forward_kl" or (divergence == "jsd" and beta == 0):
        return dense_kl(teacher_TV, student_TV)
    if divergence == "reverse_kl" or beta == 1:
        return dense_kl(student_TV, teacher_TV)
    return dense_jsd(student_TV, teacher_TV, beta)


def dense_top_k(
    ids_TK: Tensor, *, direction: str, tail: bool, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: the divergence with gradient for the student; student's and teacher's mass inside."""
    sides = []
    for logprobs_TV in (dense_logprobs(STUDENT, temperature), teacher_logprobs(temperature)):
        inside_TK = logprobs_TV.exp().gather(1, ids_TK)
        mass_T1 = inside_TK.sum(-1, keepdim=True)
        events = torch.cat((inside_TK, 1 - mass_T1), 1) if tail else inside_TK / mass_T1
        sides.append((events, mass_T1.squeeze(1).detach()))
    (p, student_mass_T), (q, teacher_mass_T) = sides
    left, right = (q, p) if direction == "forward" else (p, q)
    return (left * (left / right).log()).sum(-1), student_mass_T, teacher_mass_T
