"""Token sequences to packed micro-batches: which rank, which micro-batch, which rows.

A sequence of N tokens enters the model as its first N - 1: nobody reads what follows the last. A
row is a position whose hidden state predicts a scored token. Shape legend: N tokens of a span,
T packed input tokens, W rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from megadistill.types import FloatArray, MicroBatch, TokenSpan, TopK

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
    spans: Sequence[TokenSpan],
    indices: Sequence[int],
    rules: PackingRules,
    weights: Sequence[FloatArray] | None = None,
    top_k: Sequence[TopK | None] = (),
) -> list[MicroBatch]:
    """Pack `spans[i]` for i in `indices`; `sample_ids` are these i.

    `weights` belong to all of `spans`, one number per scored token; absent: zeros. So does `top_k`,
    if given. A span without scored tokens is left out. Raises `ValueError` for a span that scores
    its first token or more.
    """
    for index in indices:
        check_span(spans[index])
    scored = [i for i in indices if spans[i].num_scored]
    lengths = [num_inputs(spans[i]) for i in scored]
    bins = [[i] for i in range(len(scored))] if rules.cp > 1 else pack(lengths, rules.max_tokens)
    batches = []
    for own in bins:
        ids = [scored[i] for i in own]
        batch = _packed([spans[i] for i in ids], ids, rules)
        if weights is not None:
            values = np.concatenate([weights[i] for i in ids]).astype(np.float32)
            batch = replace(batch, weights_W=torch.from_numpy(values))
        if top_k:
            batch = _with_top_k(batch, [top_k[i] for i in ids])
        batches.append(_own_part(batch, rules) if rules.cp > 1 else batch)
    return batches


def _with_top_k(batch: MicroBatch, top_k: Sequence[TopK | None]) -> MicroBatch:
    """The rows' top-K ids and log-probabilities, where any sequence of the micro-batch has them."""
    sizes = {found.ids_RK.shape[1] for found in top_k if found}
    if not sizes:
        return batch
    (size,) = sizes
    shape = len(batch.rows_W), size
    ids_WK, logprobs_WK = torch.full(shape, -1), torch.zeros(shape)
    ends = np.cumsum(batch.rows_per_sample)
    for found, end, rows in zip(top_k, ends, batch.rows_per_sample, strict=True):
        if found:
            ids_WK[end - rows : end] = torch.from_numpy(found.ids_RK.astype(np.int64))
            logprobs_WK[end - rows : end] = torch.from_numpy(found.logprobs_RK)
    return replace(batch, top_ids_WK=ids_WK, top_logprobs_WK=logprobs_WK)


def empty_micro_batch(rules: PackingRules) -> MicroBatch:
    """A few padding tokens without a row: what a rank without work sends through the model."""
    span = TokenSpan(token_ids_N=np.full(2, PAD_ID, dtype=np.int32), num_scored=0)
    batch = _packed([span], [0], rules)
    batch = replace(batch, sample_ids=(), rows_per_sample=())
    return _own_part(batch, rules) if rules.cp > 1 else batch


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


def _packed(spans: Sequence[TokenSpan], ids: Sequence[int], rules: PackingRules) -> MicroBatch:
    """All spans behind each other and the padding as one more sequence; weights are zero."""
    lengths = [num_inputs(span) for span in spans]
    # A context-parallel rank holds two chunks of each sequence, so chunks are equally long.
    multiple = rules.multiple * (2 * rules.cp if rules.cp > 1 else 1)
    if missing := -sum(lengths) % multiple:
        lengths.append(missing)
    tokens = [span.token_ids_N[:-1] for span in spans]
    tokens += [np.full(missing, PAD_ID, dtype=np.int32)] if missing else []
    return MicroBatch(
        token_ids_T=_int64(tokens),
        position_ids_T=_int64([np.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        rows_W=_int64([*_tails(spans, lengths)]),
        targets_W=_int64(
            [span.token_ids_N[len(span.token_ids_N) - span.num_scored :] for span in spans]
        ),
        weights_W=torch.zeros(sum(span.num_scored for span in spans)),
        sample_ids=tuple(ids),
        rows_per_sample=tuple(span.num_scored for span in spans),
    )


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
    return replace(
        batch,
        token_ids_T=batch.token_ids_T[own],
        # The padding continues the sequence: nobody before it attends to it.
        position_ids_T=own,
        cu_seqlens=batch.cu_seqlens[[0, -1]],
        rows_W=rows[mine],
        targets_W=batch.targets_W[mine],
        weights_W=batch.weights_W[mine],
        top_ids_WK=None if batch.top_ids_WK is None else batch.top_ids_WK[mine],
        top_logprobs_WK=None if batch.top_logprobs_WK is None else batch.top_logprobs_WK[mine],
        rows_per_sample=(num_rows,) if batch.sample_ids else (),
    )


def _int64(arrays: Sequence[npt.NDArray[np.integer]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64))
