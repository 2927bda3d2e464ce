"""Log-probabilities and divergences of token spans, from models spread over all ranks.

Shape legend: R scored tokens of a span, W rows of a micro-batch, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megadistill.config.schema import HeadBackend
from megadistill.data.packing import (
    PackingRules,
    assign,
    empty_micro_batch,
    micro_batches,
    num_inputs,
)
from megadistill.head import VocabularyHead, divergences, score
from megadistill.losses import teacher_top_k
from megadistill.megatron.megatron_call import calls_megatron
from megadistill.megatron.model import output_weight
from megadistill.megatron.schedule import forward
from megadistill.megatron.world import World
from megadistill.types import FloatArray, MicroBatch, TokenSpan, TopK


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorable:
    """A model and what turns its hidden states into log-probabilities."""

    model: GPTModel
    vocab_size: int
    world: World
    backend: HeadBackend = "auto"

    def head(self, *, training: bool = False) -> VocabularyHead:
        """The last stage's vocabulary head; when training its gradient goes to `main_grad`."""
        tp = self.world.groups.tp
        return VocabularyHead(
            weight_VD=output_weight(self.model),
            vocab_size=self.vocab_size,
            group=tp if tp.size() > 1 else None,
            backend=self.backend,
            accumulate_into_main_grad=training,
        )


def own_batches(
    spans: Sequence[TokenSpan],
    rules: PackingRules,
    world: World,
    weights: Sequence[FloatArray] | None = None,
    top_k: Sequence[TopK | None] = (),
) -> list[MicroBatch]:
    """This data-parallel rank's share of `spans`, packed; at least one micro-batch."""
    shares = assign([num_inputs(span) for span in spans], world.groups.dp.size())
    own = micro_batches(spans, shares[world.groups.dp.rank()], rules, weights, top_k)
    return own or [empty_micro_batch(rules)]


@calls_megatron
def score_spans(
    scorable: Scorable, spans: Sequence[TokenSpan], rules: PackingRules
) -> list[FloatArray]:
    """fp32 log-probabilities `[R]` of every span's scored tail.

    Every rank passes the same spans and gets the same answer.
    """
    head = scorable.head() if scorable.world.is_last_stage else None

    def visit(hidden_WD: Tensor, batch: MicroBatch) -> Tensor:
        assert head is not None
        if not len(hidden_WD):
            return hidden_WD.new_zeros(0, 1, dtype=torch.float32)
        return score(head, hidden_WD, batch.targets_W[:, None]).logprobs_TK.float()

    batches = own_batches(spans, rules, scorable.world)
    scorable.model.eval()
    values = forward(scorable.model, batches, scorable.world, visit)
    return _column(_everywhere(spans, batches, values, 1, scorable.world), 0)


@calls_megatron
def top_k_spans(
    scorable: Scorable,
    spans: Sequence[TokenSpan],
    rules: PackingRules,
    *,
    top_k: int,
    temperature: float,
) -> tuple[list[FloatArray], list[TopK]]:
    """As `score_spans`, and the exact top-K of every scored token at `temperature`.

    2 K + 1 fp32 numbers a token travel between the ranks, so this is for short responses.
    """
    head = scorable.head() if scorable.world.is_last_stage else None

    def visit(hidden_WD: Tensor, batch: MicroBatch) -> Tensor:
        assert head is not None
        columns = hidden_WD.new_zeros(len(hidden_WD), 1 + 2 * top_k, dtype=torch.float32)
        if len(hidden_WD):
            columns[:, :1] = score(head, hidden_WD, batch.targets_W[:, None]).logprobs_TK
            top = teacher_top_k(head, hidden_WD, top_k, temperature=temperature)
            columns[:, 1 : 1 + top_k] = top.ids_WK  # exact: ids are far below 2^24
            columns[:, 1 + top_k :] = top.logprobs_WK
        return columns

    batches = own_batches(spans, rules, scorable.world)
    scorable.model.eval()
    values = forward(scorable.model, batches, scorable.world, visit)
    tables = _everywhere(spans, batches, values, 1 + 2 * top_k, scorable.world)
    tops = [
        TopK(ids_RK=table[:, 1 : 1 + top_k].astype(np.int32), logprobs_RK=table[:, 1 + top_k :])
        for table in tables
    ]
    return _column(tables, 0), tops


@calls_megatron
def mean_divergences(
    student: Scorable, teacher: Scorable, spans: Sequence[TokenSpan], rules: PackingRules
) -> tuple[FloatArray, FloatArray]:
    """Per span the mean over its scored tokens of KL(teacher || student) and KL(student || teacher).

    fp32 `[number of spans]` each, over the full vocabulary; NaN for a span without scored tokens.
    """
    world = student.world
    batches = own_batches(spans, rules, world)
    hidden: list[list[Tensor]] = []
    for scorable in (student, teacher):
        scorable.model.eval()
        hidden.append(forward(scorable.model, batches, world, lambda rows, _: rows))
    values = []
    for student_WD, teacher_WD in zip(*hidden, strict=True):
        columns = student_WD.new_zeros(len(student_WD), 2, dtype=torch.float32)
        if len(student_WD):
            result = divergences(student.head(), student_WD, teacher.head(), teacher_WD)
            columns[:, 0], columns[:, 1] = result.forward_kl_T, result.reverse_kl_T
        values.append(columns)
    tables = _everywhere(spans, batches, values, 2, world)
    forward_kl, reverse_kl = ([_mean(values_R) for values_R in _column(tables, i)] for i in (0, 1))
    return np.array(forward_kl, dtype=np.float32), np.array(reverse_kl, dtype=np.float32)


def _mean(values_R: FloatArray) -> float:
    return float(values_R.mean(dtype=np.float64)) if len(values_R) else float("nan")


def _everywhere(
    spans: Sequence[TokenSpan],
    batches: Sequence[MicroBatch],
    values: Sequence[Tensor],
    num_columns: int,
    world: World,
) -> list[FloatArray]:
    """`[R, columns]` of each span, on every rank, from the rows `[W, columns]` of all batches.

    Each row is written by one rank, so the sum over all ranks only moves numbers.
    """
    starts = np.concatenate([[0], np.cumsum([span.num_scored for span in spans])]).astype(np.int64)
    table = torch.zeros(int(starts[-1]), num_columns, device=world.device)
    if world.is_reporting_rank:
        for batch, rows in zip(batches, values, strict=True):
            table[_places(spans, starts, batch).to(world.device)] = rows
    dist.all_reduce(table)
    return np.split(table.cpu().numpy(), starts[1:-1]) if spans else []


def _column(tables: Sequence[FloatArray], index: int) -> list[FloatArray]:
    return [table[:, index].copy() for table in tables]


def _places(spans: Sequence[TokenSpan], starts: npt.NDArray[np.int64], batch: MicroBatch) -> Tensor:
    """Where each row's value belongs in the table of all scored tokens."""
    positions = torch.split(batch.position_ids_T[batch.rows_W], list(batch.rows_per_sample))
    places = [positions[0][:0]] if positions else [torch.empty(0, dtype=torch.int64)]
    for index, own in zip(batch.sample_ids, positions, strict=False):
        # The row at position p predicts token p + 1.
        first_scored = len(spans[index].token_ids_N) - spans[index].num_scored
        places.append(own + 1 - first_scored + int(starts[index]))
    return torch.cat(places)
