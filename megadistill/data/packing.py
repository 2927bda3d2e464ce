"""Token sequences to packed micro-batches: which rank, which micro-batch, which rows.

A sequence of N tokens enters the model as its first N - 1: nobody reads what follows the last. A
row is a position whose hidden state predicts a scored token. Shape legend: N tokens of a span,
T packed input tokens, W rows, S those with one teacher, D hidden size, K ids.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from megadistill.types import MicroBatch, Sample, TeacherRows, TokenSpan, TopK

PAD_ID = 0
"""Fills the tail of a micro-batch; nobody attends to it, nothing is scored on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingRules:
    """What a layout asks of its micro-batches."""

    max_tokens: int
    """Most input tokens in a micro-batch; one longer sequence still fits alone."""
    multiple: int = 1
    """The packed length of one context-parallel rank is a multiple of this."""
    cp: int = 1
    """Context-parallel ranks; above 1 a micro-batch holds one sequence, cut in zigzag."""
    cp_rank: int = 0


def assign(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices of sequences for each rank, so that ranks get about equally many tokens.

    The longest sequence goes first, each to the rank with the fewest tokens; ties go to the lower
    index, so that every rank computes the same answer. Indices of a rank ascend.
    """
    loads = [0] * num_ranks
    indices: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += lengths[index]
        indices[rank].append(index)
    return [sorted(own) for own in indices]


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the sequences of each micro-batch: first fit, longest first.

    A sequence longer than `max_tokens` is alone. Indices of a micro-batch ascend.
    """
    loads: list[int] = []
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fitting = (i for i, load in enumerate(loads) if load + length <= max_tokens)
        place = next(fitting, len(bins))
        if place == len(bins):
            loads.append(0)
            bins.append([])
        loads[place] += length
        bins[place].append(index)
    return [sorted(own) for own in bins]


def micro_batches(
    samples: Sequence[Sample], indices: Sequence[int], rules: PackingRules
) -> list[MicroBatch]:
    """Pack `samples[i]` for i in `indices`; `sample_ids` are these i.

    A sample without scored tokens is left out. Raises `ValueError` for one that scores its first
    token or more.
    """
    for index in indices:
        check_span(samples[index].span)
    scored = [i for i in indices if samples[i].span.num_scored]
    lengths = [num_inputs(samples[i].span) for i in scored]
    bins = [[i] for i in range(len(scored))] if rules.cp > 1 else pack(lengths, rules.max_tokens)
    batches = []
    for own in bins:
        ids = [scored[i] for i in own]
        batch = _packed([samples[i] for i in ids], ids, rules)
        batches.append(_own_part(batch, rules) if rules.cp > 1 else batch)
    return batches


def empty_micro_batch(rules: PackingRules) -> MicroBatch:
    """A few padding tokens without a row: what a rank without work sends through the model."""
    span = TokenSpan(token_ids_N=np.full(2, PAD_ID, dtype=np.int32), num_scored=0)
    batch = _packed([unweighted(span)], [0], rules)
    batch = replace(batch, sample_ids=(), rows_per_sample=())
    return _own_part(batch, rules) if rules.cp > 1 else batch


def unweighted(span: TokenSpan, top_k: TopK | None = None) -> Sample:
    """A span that is only scored."""
    zeros_R = np.zeros(span.num_scored, dtype=np.float32)
    return Sample(span=span, weights_R=zeros_R, top_k=top_k)


def num_inputs(span: TokenSpan) -> int:
    """Tokens of a span that enter the model."""
    return len(span.token_ids_N) - 1


def check_span(span: TokenSpan) -> None:
    """Raise `ValueError` if the scored tail holds the first token, which nothing predicts."""
    if not 0 <= span.num_scored <= num_inputs(span):
        raise ValueError(
            f"num_scored: found {span.num_scored} in a span of {len(span.token_ids_N)} tokens, "
            f"expected at most {max(num_inputs(span), 0)}"
        )


def _packed(samples: Sequence[Sample], ids: Sequence[int], rules: PackingRules) -> MicroBatch:
    """All sequences behind each other and the padding as one more."""
    spans = [sample.span for sample in samples]
    lengths = [num_inputs(span) for span in spans]
    # A context-parallel rank holds two chunks of each sequence, so chunks are equally long.
    multiple = rules.multiple * (2 * rules.cp if rules.cp > 1 else 1)
    if missing := -sum(lengths) % multiple:
        lengths.append(missing)
    tokens = [span.token_ids_N[:-1] for span in spans]
    tokens += [np.full(missing, PAD_ID, dtype=np.int32)] if missing else []
    top_ids_WK, top_logprobs_WK = _top_k(samples)
    return MicroBatch(
        token_ids_T=_int64(tokens),
        position_ids_T=_int64([np.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        rows_W=_int64([*_tails(spans, lengths)]),
        targets_W=_int64(
            [span.token_ids_N[len(span.token_ids_N) - span.num_scored :] for span in spans]
        ),
        weights_W=_float32([sample.weights_R for sample in samples]),
        divergence_weights_W=_divergence_weights(samples),
        teachers=_teachers(samples),
        sample_ids=tuple(ids),
        rows_per_sample=tuple(span.num_scored for span in spans),
        top_ids_WK=top_ids_WK,
        top_logprobs_WK=top_logprobs_WK,
    )


def _divergence_weights(samples: Sequence[Sample]) -> torch.Tensor | None:
    found = [sample.divergence_weights_R for sample in samples]
    if all(weights_R is None for weights_R in found):
        return None
    zeros = [np.zeros(sample.span.num_scored) for sample in samples]
    return _float32([zeros[i] if w_R is None else w_R for i, w_R in enumerate(found)])


def _top_k(samples: Sequence[Sample]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The rows' K ids and log-probabilities, where any sequence of the micro-batch has them."""
    sizes = {sample.top_k.ids_RK.shape[1] for sample in samples if sample.top_k}
    if not sizes:
        return None, None
    (size,) = sizes
    blank = [np.zeros((sample.span.num_scored, size)) for sample in samples]
    pairs = list(zip(samples, blank, strict=True))
    return (
        _int64([(s.top_k.ids_RK if s.top_k else zeros - 1).astype(np.int64) for s, zeros in pairs]),
        _float32([s.top_k.logprobs_RK if s.top_k else zeros for s, zeros in pairs]),
    )


def _teachers(samples: Sequence[Sample]) -> dict[str, TeacherRows]:
    """Each teacher's hidden states, in the rows where they count."""
    rows: dict[str, list[torch.Tensor]] = {}
    hidden: dict[str, list[torch.Tensor]] = {}
    start = 0
    for sample in samples:
        if sample.teacher is not None and sample.hidden_RD is not None:
            assert sample.divergence_weights_R is not None
            counting_S = torch.from_numpy(sample.divergence_weights_R.nonzero()[0])
            rows.setdefault(sample.teacher, []).append(start + counting_S)
            hidden.setdefault(sample.teacher, []).append(sample.hidden_RD[counting_S])
        start += sample.span.num_scored
    found = {
        name: TeacherRows(rows_S=torch.cat(rows[name]), hidden_SD=torch.cat(hidden[name]))
        for name in rows
    }
    return {name: teacher for name, teacher in found.items() if len(teacher.rows_S)}


def _tails(spans: Sequence[TokenSpan], lengths: Sequence[int]) -> Iterator[npt.NDArray[np.int64]]:
    """Packed positions of each span's last `num_scored` inputs."""
    ends = np.cumsum(lengths)
    for span, end in zip(spans, ends, strict=False):
        yield np.arange(end - span.num_scored, end)


def _own_part(batch: MicroBatch, rules: PackingRules) -> MicroBatch:
    """One context-parallel rank's chunks of a micro-batch with one sequence, and its rows there.

    Of 2 cp chunks rank r holds r and 2 cp - 1 - r, in this order: Megatron's split.
    """
    chunks = torch.arange(len(batch.token_ids_T)).chunk(2 * rules.cp)
    own = torch.cat([chunks[rules.cp_rank], chunks[2 * rules.cp - 1 - rules.cp_rank]])
    local = torch.full_like(batch.token_ids_T, -1)
    local[own] = torch.arange(len(own))
    rows = local[batch.rows_W]
    mine = rows >= 0
    num_rows = int(mine.sum())

    def cut(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[mine]

    return replace(
        batch,
        token_ids_T=batch.token_ids_T[own],
        # The padding continues the sequence: nobody before it attends to it.
        position_ids_T=own,
        cu_seqlens=batch.cu_seqlens[[0, -1]],
        rows_W=rows[mine],
        targets_W=batch.targets_W[mine],
        weights_W=batch.weights_W[mine],
        divergence_weights_W=cut(batch.divergence_weights_W),
        teachers=_own_teachers(batch.teachers, mine),
        top_ids_WK=cut(batch.top_ids_WK),
        top_logprobs_WK=cut(batch.top_logprobs_WK),
        rows_per_sample=(num_rows,) if batch.sample_ids else (),
    )


def _own_teachers(
    teachers: Mapping[str, TeacherRows], mine_W: torch.Tensor
) -> dict[str, TeacherRows]:
    """The rows that this rank has, counted among its own."""
    places_W = mine_W.cumsum(0) - 1
    found = {}
    for name, teacher in teachers.items():
        kept_S = mine_W[teacher.rows_S]
        if kept_S.any():
            rows_S, hidden_SD = places_W[teacher.rows_S[kept_S]], teacher.hidden_SD[kept_S]
            found[name] = TeacherRows(rows_S=rows_S, hidden_SD=hidden_SD)
    return found


def _float32(arrays: Sequence[npt.NDArray[np.floating]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.float32))


def _int64(arrays: Sequence[npt.NDArray[np.integer]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64))
