"""Row statistics of sharded logits: soft-max normaliser, entropy, chosen logits; over all ranks.

A row's normaliser is kept as the pair (maximum, log of the sum of exp(z - maximum)): log-probs
`(z - maximum) - log_sum` then lose nothing when logits are huge, as `z - logsumexp` would.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megadistill.head.projection import row_blocks
from megadistill.head.vocabulary import VocabularyHead


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

    @property
    def logsumexp(self) -> Tensor:
        """Logarithm of the sum of exp(z)."""
        return self.maximum_C + self.log_sum

    def logprobs(self, logits_CK: Tensor) -> Tensor:
        """Log-probabilities of some logits of each row."""
        return logits_CK - self.maximum_C[:, None] - self.log_sum[:, None]

    def normalise_(self, logits_BV: Tensor, block: slice) -> Tensor:
        """Turn the logits of a block of rows into log-probabilities, in place."""
        logits_BV -= self.maximum_C[block, None]
        logits_BV -= self.sum_exp_C[block, None].log()
        return logits_BV

    @property
    def entropy(self) -> Tensor:
        """Entropy of the soft-max, in nats."""
        assert self.sum_shifted_C is not None
        return self.log_sum - self.sum_shifted_C / self.sum_exp_C


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


def exponentiate(
    logits_CV: Tensor,
    *,
    with_entropy: bool = False,
    tile_CV: Tensor | None = None,
    keep_logits: bool = False,
) -> RowStatistics:
    """Turn this shard's logits into exp(z - maximum), in place, and return their statistics.

    With `tile_CV` the exponentials are also written there, in the tile's narrower type; with
    `keep_logits` they are made in a block of scratch and dropped.
    """
    num_rows = logits_CV.shape[0]
    if logits_CV.shape[1] == 0:
        # Nothing but padding here. A finite maximum far below any logit keeps the combination of
        # ranks free of inf - inf.
        zeros_C = logits_CV.new_zeros(num_rows)
        lowest = torch.finfo(logits_CV.dtype).min / 4
        return RowStatistics(maximum_C=zeros_C + lowest, sum_exp_C=zeros_C, sum_shifted_C=zeros_C)
    maximum_C, sum_exp_C, sum_shifted_C = logits_CV.new_empty(3, num_rows)
    blocks = row_blocks(logits_CV)
    scratch = torch.empty_like(logits_CV[blocks[0]])
    for block in blocks:
        z = logits_CV[block]
        x = scratch[: z.shape[0]]
        torch.amax(z, -1, out=maximum_C[block])
        torch.sub(z, maximum_C[block, None], out=x)
        if keep_logits:
            torch.sum(x.exp_(), -1, out=sum_exp_C[block])
            continue
        torch.exp(x, out=z)
        torch.sum(z, -1, out=sum_exp_C[block])
        if with_entropy:
            torch.sum(x.mul_(z), -1, out=sum_shifted_C[block])
        if tile_CV is not None:
            tile_CV[block] = z
    return RowStatistics(
        maximum_C=maximum_C,
        sum_exp_C=sum_exp_C,
        sum_shifted_C=sum_shifted_C if with_entropy else None,
    )


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
