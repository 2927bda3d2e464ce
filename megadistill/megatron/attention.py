"""Attention in plain torch: causal, grouped-query, packed sequences, context parallel.

The stock torch attention of Megatron-Core refuses packed sequences and context parallelism. Shape
legend: S local tokens of a sequence, B batch, H query heads and G key/value heads of this rank, D
head size, T packed tokens.
"""

import math
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional


def gather_zigzag(local_SBGD: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Whole sequence from the pieces of a context-parallel group, in natural order.

    Rank r of n holds chunks r and 2n-1-r of 2n, so that causal work is even. Backward sums each
    chunk's gradient over the ranks and returns it to the owner.
    """
    num_ranks = group.size()
    gathered = gather_from_sequence_parallel_region(local_SBGD.contiguous(), group=group)
    pieces = [piece.chunk(2) for piece in gathered.chunk(num_ranks)]
    return torch.cat([early for early, _ in pieces] + [late for _, late in reversed(pieces)])


class CoreAttention(torch.nn.Module):
    """Scaled dot-product attention with the constructor and call of Megatron's core attention."""

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **layer: Any,  # Megatron also passes the layer's number, mask type and the like
    ) -> None:
        super().__init__()
        if config.attention_dropout:
            raise ValueError(f"attention_dropout: found {config.attention_dropout}, expected 0")
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.cp_group = groups.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,  # mask type and bias: always causal, never biased
    ) -> Tensor:
        """`[S, B, H, D]`, `[S, B, G, D]` twice to `[S, B, H D]`; packed `[T, H, D]` to `[T, H D]`.

        `attention_mask` is not read: attention is causal within each sequence.
        """
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        if self.cp_group.size() > 1:
            return self._context_parallel(query, key, value)
        return self._attend(query, key, value, None)

    def _packed(
        self, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packed: PackedSeqParams
    ) -> Tensor:
        lengths = packed.cu_seqlens_q.diff().tolist()
        sequences = zip(
            torch.split(query_THD[:, None], lengths),
            torch.split(key_TGD[:, None], lengths),
            torch.split(value_TGD[:, None], lengths),
            strict=True,
        )
        return torch.cat([self._attend(q, k, v, None) for q, k, v in sequences]).squeeze(1)

    def _context_parallel(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        num_ranks, rank = self.cp_group.size(), self.cp_group.rank()
        chunk = query.size(0) // 2
        key, value = gather_zigzag(key, self.cp_group), gather_zigzag(value, self.cp_group)
        positions = torch.arange(key.size(0), device=key.device)
        late = 2 * num_ranks - 1 - rank
        own = torch.cat(
            [positions[rank * chunk : (rank + 1) * chunk], positions[late * chunk :][:chunk]]
        )
        return self._attend(query, key, value, positions[None, :] <= own[:, None])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """`[S, B, H, D]` to `[S, B, H D]`; causal unless a mask (True: may look) is given.

        Computed in fp32: torch's CPU kernel takes twice as long backward in bf16.
        """
        q, k, v = (t.permute(1, 2, 0, 3).float() for t in (query, key, value))
        out = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=q.size(1) != k.size(1),
        )
        # Through plain rows, for the reason given in RMSNormColumnParallelLinear.
        rows = out.permute(2, 0, 1, 3).reshape(-1, q.size(1) * q.size(3)).to(value.dtype)
        return rows.view(query.size(0), query.size(1), -1)
