"""Log-probabilities and divergences of token spans, from models spread over all ranks.

Shape legend: R scored tokens of a span, W rows of a micro-batch, D hidden size, K ids.
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
    unweighted,
)
from megadistill.head import VocabularyHead, divergences, score
from megadistill.megatron.megatron_call import calls_megatron
from megadistill.megatron.model import output_weight
from megadistill.megatron.schedule import forward
from megadistill.megatron.world import World
from megadistill.types import (
    FloatArray,
    Int32Array,
    MicroBatch,
    Sample,
    ScoreRequest,
    TokenScores,
    TokenSpan,
    TopK,
)

SLAB_ELEMENTS = 2**26
"""Of what all ranks share of a batch's numbers at a time."""


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


def own_batches(samples: Sequence[Sample], rules: PackingRules, world: World) -> list[MicroBatch]:
    """This data-parallel rank's share of `samples`, packed; at least one micro-batch."""
    shares = assign([num_inputs(sample.span) for sample in samples], world.groups.dp.size())
    own = micro_batches(samples, shares[world.groups.dp.rank()], rules)
    return own or [empty_micro_batch(rules)]


@calls_megatron
def read_spans(
    scorable: Scorable,
    spans: Sequence[TokenSpan],
    rules: PackingRules,
    request: ScoreRequest,
    ids: Sequence[Int32Array] | None = None,
) -> list[TokenScores]:
    """What `request` asks for at every span's scored tail, and the log-probabilities of its `ids`.

    Every rank passes the same and gets the same answer, for which each number travels between the
    ranks as fp32, hidden states in their own type.
    """
    _check_request(scorable, spans, request, ids)
    world = scorable.world
    head = scorable.head() if world.is_last_stage else None

    def visit(hidden_WD: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        assert head is not None
        kept = len(hidden_WD) if request.hidden and world.is_reporting_rank else 0
        return _columns(head, hidden_WD, batch, request), hidden_WD[:kept].cpu()

    samples = [
        unweighted(span, None if ids is None else _support(ids[index]))
        for index, span in enumerate(spans)
    ]
    batches = own_batches(samples, rules, world)
    scorable.model.eval()
    values = forward(scorable.model, batches, world, visit)
    widths = 1, int(request.entropy), request.top_k, request.top_k, ids[0].shape[1] if ids else 0
    rows = [columns for columns, _ in values]
    tables = _everywhere(spans, batches, rows, (sum(widths), torch.float32), world)
    hidden: list[Tensor] | None = None
    if request.hidden:
        config = scorable.model.config
        width = config.hidden_size, config.params_dtype
        hidden = _everywhere(spans, batches, [kept for _, kept in values], width, world)
    return [
        _scores(table, widths, None if hidden is None else hidden[index])
        for index, table in enumerate(tables)
    ]


def score_spans(
    scorable: Scorable, spans: Sequence[TokenSpan], rules: PackingRules
) -> list[FloatArray]:
    """fp32 log-probabilities `[R]` of every span's scored tail, equal on every rank."""
    return [found.logprobs_R for found in read_spans(scorable, spans, rules, ScoreRequest())]


def _check_request(
    scorable: Scorable,
    spans: Sequence[TokenSpan],
    request: ScoreRequest,
    ids: Sequence[Int32Array] | None,
) -> None:
    """On every rank, before any of them waits for another."""
    if not 0 <= request.top_k <= scorable.vocab_size:
        raise ValueError(
            f"top_k: found {request.top_k}, expected at most the vocabulary's {scorable.vocab_size}"
        )
    if ids is None:
        return
    if len(ids) != len(spans):
        raise ValueError(f"ids: found {len(ids)} arrays, expected one a span, {len(spans)}")
    for index, (span, ids_RK) in enumerate(zip(spans, ids, strict=True)):
        if ids_RK.shape != (span.num_scored, ids[0].shape[-1]):
            raise ValueError(
                f"ids[{index}]: found the shape {ids_RK.shape}, expected as many rows as scored "
                f"tokens and as many columns as ids[0], ({span.num_scored}, {ids[0].shape[-1]})"
            )


def _support(ids_RK: Int32Array) -> TopK:
    return TopK(ids_RK=ids_RK, logprobs_RK=np.zeros(ids_RK.shape, dtype=np.float32))


def _columns(
    head: VocabularyHead, hidden_WD: Tensor, batch: MicroBatch, request: ScoreRequest
) -> Tensor:
    """fp32 `[W, ...]`: log-probability, entropy, top ids and theirs, log-probabilities at ids."""
    target_W1 = batch.targets_W[:, None]
    ids_WK = target_W1[:, :0] if batch.top_ids_WK is None else batch.top_ids_WK
    num_columns = 1 + request.entropy + 2 * request.top_k + ids_WK.shape[1]
    if not len(hidden_WD):
        return hidden_WD.new_zeros(0, num_columns, dtype=torch.float32)
    together = request.temperature == 1.0  # then one sweep answers everything
    first = score(
        head,
        hidden_WD,
        torch.cat((target_W1, ids_WK), 1) if together else target_W1,
        top_k=request.top_k if together else 0,
        with_entropy=request.entropy,
    )
    second = first
    if not together and (request.top_k or ids_WK.shape[1]):
        second = score(
            head, hidden_WD, ids_WK, temperature=request.temperature, top_k=request.top_k
        )
    columns = [first.logprobs_TK[:, :1]]
    if first.entropy_T is not None:
        columns.append(first.entropy_T[:, None])
    if second.top_ids_TK is not None and second.top_logprobs_TK is not None:
        columns += [second.top_ids_TK, second.top_logprobs_TK]  # ids below 2^24 are exact in fp32
    if ids_WK.shape[1]:
        columns.append(second.logprobs_TK[:, -ids_WK.shape[1] :])
    return torch.cat([column.float() for column in columns], 1)


def _scores(table: Tensor, widths: Sequence[int], hidden_RD: Tensor | None) -> TokenScores:
    """One span's columns, taken apart."""
    parts = [part.numpy().copy() for part in torch.split(table, list(widths), 1)]
    logprob_R1, entropy_R1, top_ids_RK, top_logprobs_RK, at_ids_RK = parts
    top_k = TopK(ids_RK=top_ids_RK.astype(np.int32), logprobs_RK=top_logprobs_RK)
    return TokenScores(
        logprobs_R=logprob_R1[:, 0],
        entropy_R=entropy_R1[:, 0] if widths[1] else None,
        top_k=top_k if widths[2] else None,
        at_ids_RK=at_ids_RK if widths[4] else None,
        hidden_RD=hidden_RD,
    )


@calls_megatron
def token_divergences(
    student: Scorable, teacher: Scorable, spans: Sequence[TokenSpan], rules: PackingRules
) -> list[FloatArray]:
    """Of each span's scored tokens KL(teacher || student) and KL(student || teacher).

    fp32 `[R, 2]` a span, over the full vocabulary.
    """
    world = student.world
    batches = own_batches([unweighted(span) for span in spans], rules, world)
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
    tables = _everywhere(spans, batches, values, (2, torch.float32), world)
    return [table.numpy() for table in tables]


def mean_divergences(tables: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray]:
    """Means over each span's tokens, `[number of spans]` each; NaN for a span without any."""
    forward_kl, reverse_kl = ([_mean(rows[:, i].copy()) for rows in tables] for i in (0, 1))
    return np.array(forward_kl, dtype=np.float32), np.array(reverse_kl, dtype=np.float32)


def _mean(values_R: FloatArray) -> float:
    return float(values_R.mean(dtype=np.float64)) if len(values_R) else float("nan")


def _everywhere(
    spans: Sequence[TokenSpan],
    batches: Sequence[MicroBatch],
    values: Sequence[Tensor],
    columns: tuple[int, torch.dtype],
    world: World,
) -> list[Tensor]:
    """`[R, columns]` of each span, on every rank's host, from the rows `[W, columns]` of all batches.

    Each row is written by one rank, so the sum over all ranks only moves numbers. A slab of the
    table is on the device at a time.
    """
    lengths = [span.num_scored for span in spans]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    (num_columns, dtype), num_rows = columns, int(starts[-1])
    table = torch.zeros(num_rows, num_columns, dtype=dtype)
    if world.is_reporting_rank:
        for batch, rows in zip(batches, values, strict=True):
            table[_places(spans, starts, batch).cpu()] = rows.cpu()
    for slab in torch.split(table, max(1, SLAB_ELEMENTS // num_columns)):
        moved = slab.to(world.device)
        dist.all_reduce(moved)
        slab.copy_(moved)
    return list(torch.split(table, lengths)) if spans else []


def _places(spans: Sequence[TokenSpan], starts: npt.NDArray[np.int64], batch: MicroBatch) -> Tensor:
    """Where each row's value belongs in the table of all scored tokens."""
    positions = torch.split(batch.position_ids_T[batch.rows_W], list(batch.rows_per_sample))
    places = [positions[0][:0]] if positions else [torch.empty(0, dtype=torch.int64)]
    for index, own in zip(batch.sample_ids, positions, strict=False):
        # The row at position p predicts token p + 1.
        first_scored = len(spans[index].token_ids_N) - spans[index].num_scored
        places.append(own + 1 - first_scored + int(starts[index]))
    return torch.cat(places)
