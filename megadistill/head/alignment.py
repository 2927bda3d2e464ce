"""Bring a teacher's shard to the student's cut of the vocabulary.

Two heads over one vocabulary may be padded differently, and then rank r of the one does not hold
the ids of rank r of the other. Only the rows between the two cuts change ranks.
"""

import dataclasses

import torch.distributed as dist

from megadistill.head.vocabulary import VocabularyHead


def align(head: VocabularyHead, rows_per_rank: int) -> VocabularyHead:
    """The same head with `rows_per_rank` rows on every rank; itself if it is cut like that."""
    shard_VD = head.weight_VD.detach()
    held = shard_VD.shape[0]
    if head.group is None or held == rows_per_rank:
        return head
    rank = dist.get_rank(head.group)
    aligned_VD = shard_VD.new_zeros(rows_per_rank, shard_VD.shape[1])
    operations: list[dist.P2POp] = []
    for peer in range(head.num_ranks):
        sent = _overlap(rank * held, held, peer * rows_per_rank, rows_per_rank, head.vocab_size)
        got = _overlap(peer * held, held, rank * rows_per_rank, rows_per_rank, head.vocab_size)
        source = shard_VD[_within(sent, rank * held)]
        target = aligned_VD[_within(got, rank * rows_per_rank)]
        if peer == rank:
            target.copy_(source)
            continue
        place = dist.get_global_rank(head.group, peer)
        if len(sent):
            operations.append(dist.P2POp(dist.isend, source.contiguous(), place, head.group))
        if len(got):
            operations.append(dist.P2POp(dist.irecv, target, place, head.group))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return dataclasses.replace(head, weight_VD=aligned_VD)


def _overlap(start: int, size: int, other_start: int, other_size: int, end: int) -> range:
    """Global ids below `end` that lie in both intervals."""
    low = max(start, other_start)
    return range(low, max(low, min(start + size, other_start + other_size, end)))


def _within(ids: range, start: int) -> slice:
    """The rows of a shard that starts at id `start`."""
    return slice(ids.start - start, ids.stop - start)
