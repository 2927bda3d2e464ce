"""Scoring without gradient: log-probs at ids, entropy, top-K."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.head.backend import backend_of
from megadistill.head.checks import check_hidden, check_ids, check_top_k
from megadistill.head.projection import project
from megadistill.head.rows import (
    RowStatistics,
    combine,
    gather_ranks,
    join,
    largest,
    pick,
    sum_ranks,
)
from megadistill.head.vocabulary import VocabularyHead


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadScores:
    """What a head says about each row, in fp32 and equal on every rank; nothing has a gradient."""

    logprobs_TK: Tensor
    """Log-probabilities at the ids that were asked for."""
    entropy_T: Tensor | None
    """In nats; None unless asked for."""
    top_ids_TK: Tensor | None
    """Most probable ids, descending (ties in any order); column 0 is the arg-max."""
    top_logprobs_TK: Tensor | None


@torch.no_grad()
def score(
    head: VocabularyHead,
    hidden_TD: Tensor,
    ids_TK: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    with_entropy: bool = False,
) -> HeadScores:
    """Log-probabilities of `softmax(hidden @ weight.T / temperature)` at `ids_TK`, and more.

    One product and one pass; over a group one exchange of 3 + K (+ 2 top_k) numbers per row.
    """
    check_hidden(head, hidden_TD, temperature)
    check_ids(head, hidden_TD, ids_TK)
    check_top_k(head, top_k)
    sweep = sweep_statistics(
        head, hidden_TD, ids_TK, temperature=temperature, top_k=top_k, with_entropy=with_entropy
    )
    total = sweep.total
    top_ids_TK = top_logprobs_TK = None
    if sweep.top is not None:
        top_logits_TK, top_ids_TK = _merge_top(head, *sweep.top, top_k)
        top_logprobs_TK = total.logprobs(top_logits_TK)
    return HeadScores(
        logprobs_TK=total.logprobs(sweep.picked_TK),
        entropy_T=total.entropy if with_entropy else None,
        top_ids_TK=top_ids_TK,
        top_logprobs_TK=top_logprobs_TK,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """One pass over all rows: statistics over all ranks, logits at the ids, this rank's top-K."""

    total: RowStatistics
    picked_TK: Tensor
    top: tuple[Tensor, Tensor] | None
    """Logits and global ids of the largest min(K, rows of this shard) logits."""


def sweep_statistics(
    head: VocabularyHead,
    hidden_TD: Tensor,
    ids_TK: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    with_entropy: bool = False,
) -> Sweep:
    """Run the forward sweep that scoring and the two-pass log-probs share; checks nothing."""
    hidden_TD = hidden_TD.detach()
    backend, weight_VD = backend_of(head), head.true_weight
    chunks = head.chunks(hidden_TD.shape[0])
    logits = hidden_TD.new_empty(chunks[0].stop, weight_VD.shape[0], dtype=head.compute_dtype)
    parts: list[RowStatistics] = []
    picked: list[Tensor] = []
    tops: list[tuple[Tensor, Tensor]] = []
    for rows in chunks:
        z_CV = logits[: rows.stop - rows.start]
        project(hidden_TD[rows], weight_VD, temperature, z_CV)
        picked.append(pick(head, z_CV, ids_TK[rows]))
        if top_k:
            values_CK, columns_CK = largest(z_CV, min(top_k, z_CV.shape[1]))
            tops.append((values_CK, columns_CK + head.offset))
        parts.append(backend.statistics(z_CV, with_entropy=with_entropy))
    return Sweep(
        total=combine(join(parts), head.group),
        picked_TK=sum_ranks(torch.cat(picked), head.group),
        top=(torch.cat([v for v, _ in tops]), torch.cat([i for _, i in tops])) if top_k else None,
    )


def _merge_top(
    head: VocabularyHead, values_TK: Tensor, ids_TK: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """Exact global top-K from every rank's own."""
    if head.group is None:
        return values_TK, ids_TK
    # Ranks may own fewer than K true rows: fill up with logits that never win.
    missing = top_k - values_TK.shape[1]
    values_TK = torch.nn.functional.pad(values_TK, (0, missing), value=-torch.inf)
    ids_TK = torch.nn.functional.pad(ids_TK, (0, missing), value=-1)
    all_values_TK = torch.cat(list(gather_ranks(values_TK, head.group)), -1)
    all_ids_TK = torch.cat(list(gather_ranks(ids_TK, head.group)), -1)
    top_TK, places_TK = all_values_TK.topk(top_k, -1)
    return top_TK, all_ids_TK.gather(1, places_TK)
