"""Row statistics of sharded logits: soft-max normaliser, entropy, chosen and largest logits.

A row's normaliser is kept as the pair (maximum, log of the sum of exp(z - maximum)): log-probs
`(z - maximum) - log_sum` then lose nothing when logits are huge, as `z - logsumexp` would.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megadistill.head.vocabulary import VocabularyHead

# Top-K looks at the maxima of groups of this many logits first.
TOP_K_GROUP = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStatistics:
    """What one row's soft-max needs, per row; on one rank's shard or over the whole vocabulary."""

    maximum_C: Tensor
    sum_exp_C: Tensor
    """Sum of exp(z - maximum)."""
    sum_shifted_C: Tensor | None = None
    """Sum of exp(z - maximum) (z - maximum), for the entropy."""

    @property
    def log_sum(self) -> Tensor:
        """Logarithm of the sum: log-probabilities are (z - maximum) - log_sum."""
        return self.sum_exp_C.log()

    def rows(self, rows: slice) -> "RowStatistics":
        """The statistics of some rows, without the entropy sum."""
        return RowStatistics(maximum_C=self.maximum_C[rows], sum_exp_C=self.sum_exp_C[rows])

    def logprobs(self, logits_CK: Tensor) -> Tensor:
        """Log-probabilities of some logits of each row."""
        return logits_CK - self.maximum_C[:, None] - self.log_sum[:, None]

    @property
    def entropy(self) -> Tensor:
        """Entropy of the soft-max, in nats."""
        assert self.sum_shifted_C is not None
        return self.log_sum - self.sum_shifted_C / self.sum_exp_C


def join(parts: list[RowStatistics]) -> RowStatistics:
    """One set of statistics from those of consecutive rows."""
    shifted = [part.sum_shifted_C for part in parts if part.sum_shifted_C is not None]
    return RowStatistics(
        maximum_C=torch.cat([part.maximum_C for part in parts]),
        sum_exp_C=torch.cat([part.sum_exp_C for part in parts]),
        sum_shifted_C=torch.cat(shifted) if shifted else None,
    )


def gather_ranks(rows: Tensor, group: ProcessGroup) -> Tensor:
    """Stack one small tensor of every rank in front, in rank order."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, rows.contiguous(), group=group)
    return torch.stack(parts)


def sum_ranks(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over ranks, in place; nothing to do without a group."""
    if group is not None:
        dist.all_reduce(rows, group=group)
    return rows


def combine(local: RowStatistics, group: ProcessGroup | None) -> RowStatistics:
    """Combine every rank's statistics: one all-gather of three numbers per row."""
    if group is None:
        return local
    shifted = local.sum_shifted_C if local.sum_shifted_C is not None else local.sum_exp_C
    packed = torch.stack((local.maximum_C, local.sum_exp_C, shifted), -1)
    maxima_RC, sums_RC, shifted_RC = gather_ranks(packed, group).unbind(-1)
    maximum_C = maxima_RC.amax(0)
    below_RC = maxima_RC - maximum_C
    scale_RC = below_RC.exp()
    total = None
    if local.sum_shifted_C is not None:
        total = (scale_RC * (shifted_RC + below_RC * sums_RC)).sum(0)
    return RowStatistics(
        maximum_C=maximum_C, sum_exp_C=(scale_RC * sums_RC).sum(0), sum_shifted_C=total
    )


def locate(head: VocabularyHead, ids_CK: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of global ids in this rank's tile, and which of them this rank owns.

    Ids of other ranks get column 0, so that the pair can index any non-empty tile.
    """
    columns_CK = ids_CK - head.offset
    owned_CK = (columns_CK >= 0) & (columns_CK < head.num_true_rows)
    return columns_CK.masked_fill(~owned_CK, 0), owned_CK


def pick(head: VocabularyHead, logits_CV: Tensor, ids_CK: Tensor) -> Tensor:
    """Logits at global ids, zero where another rank owns the id: sum over ranks to complete."""
    if logits_CV.shape[1] == 0:
        return logits_CV.new_zeros(ids_CK.shape)
    columns_CK, owned_CK = locate(head, ids_CK)
    return logits_CV.gather(1, columns_CK).masked_fill(~owned_CK, 0.0)


def place(head: VocabularyHead, tile_CV: Tensor, ids_CK: Tensor, entries_CK: Tensor) -> None:
    """Overwrite the tile at the global ids that this rank owns; repeated ids repeat their entry."""
    columns_CK, owned_CK = locate(head, ids_CK)
    rows_N, places_N = owned_CK.nonzero(as_tuple=True)
    tile_CV[rows_N, columns_CK[rows_N, places_N]] = entries_CK[rows_N, places_N].to(tile_CV.dtype)


def largest(logits_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The exactly largest logits and their columns, descending.

    The largest K lie in the K groups with the largest maxima, or ties with others that do, and in
    the columns that fill no group: one read of all logits, then a search among K groups.
    """
    num_groups, rest = divmod(logits_CV.shape[1], TOP_K_GROUP)
    if num_groups <= k:
        values_CK, columns_CK = logits_CV.topk(k, -1)
        return values_CK, columns_CK
    grouped_CGN = logits_CV[:, : num_groups * TOP_K_GROUP].view(-1, num_groups, TOP_K_GROUP)
    starts_CK = grouped_CGN.amax(-1).topk(k, -1, sorted=False).indices * TOP_K_GROUP
    within_N = torch.arange(TOP_K_GROUP, device=logits_CV.device)
    rest_N = torch.arange(rest, device=logits_CV.device) + num_groups * TOP_K_GROUP
    candidates_CN = torch.cat(
        (
            (starts_CK[:, :, None] + within_N).flatten(1),
            rest_N.expand(logits_CV.shape[0], -1),
        ),
        -1,
    )
    values_CK, places_CK = logits_CV.gather(1, candidates_CN).topk(k, -1)
    return values_CK, candidates_CN.gather(1, places_CK)
