"""The vocabulary head: one rank's shard of the output projection and how to sweep over it.

Shape suffixes in this package: T tokens (rows), C rows of one chunk, D hidden size, V vocabulary
rows of this rank, K ids per row or top-K, R ranks of the group.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# One chunk of logits, in elements. Every chunk reads and writes the whole fp32 weight gradient: few
# large chunks are fast, and memory is the limit (2048 rows of Qwen3's vocabulary take 1.2 GB).
CHUNK_ELEMENTS_CPU = 24 * 2**20
CHUNK_ELEMENTS_GPU = 304 * 2**20
CHUNK_ROW_MULTIPLE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyHead:
    """A shard of the output projection, `logits = hidden @ weight.T`, and its sweep settings."""

    weight_VD: Tensor
    """This rank's rows, in rank order; rows past `vocab_size` are padding at the global end."""
    vocab_size: int
    """Number of true rows over all ranks; padding rows get probability zero and no gradient."""
    group: ProcessGroup | None = None
    """Tensor-parallel group holding the shards; None means that this rank holds every row."""
    chunk_tokens: int | None = None
    """Rows whose logits exist at one time; None picks them from the shard's size and device."""
    backend: Literal["auto", "torch", "triton"] = "auto"
    """`auto` is triton for a weight on a GPU where triton is installed, and torch otherwise."""
    accumulate_into_main_grad: bool = False
    """Add the fp32 weight gradient to `weight_VD.main_grad` instead of returning it. One-pass sums
    do so in their forward sweep, and then take no upstream gradient but 1 in backward."""
    reduce_hidden_gradient: bool = False
    """All-reduce the hidden gradient over `group`; off, each rank returns its partial sum, which
    the caller's copy-to-tensor-parallel region (Megatron's) sums in its own backward."""

    def __post_init__(self) -> None:
        if self.weight_VD.dim() != 2:
            raise ValueError(
                f"weight_VD must be 2-D [rows, D], found {tuple(self.weight_VD.shape)}"
            )
        if not self.weight_VD.is_floating_point():
            raise ValueError(f"weight_VD must be a float tensor, found {self.weight_VD.dtype}")
        num_rows = self.weight_VD.shape[0] * self.num_ranks
        if not 0 < self.vocab_size <= num_rows:
            raise ValueError(
                f"vocab_size must be in 1..{num_rows} (rows over all ranks), found {self.vocab_size}"
            )
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, found {self.chunk_tokens}")

    @property
    def num_ranks(self) -> int:
        """Number of ranks that share the vocabulary."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def offset(self) -> int:
        """Global id of this rank's first row."""
        rank = 0 if self.group is None else dist.get_rank(self.group)
        return rank * self.weight_VD.shape[0]

    @property
    def num_true_rows(self) -> int:
        """Rows of this shard that are not padding; zero on a rank that holds only padding."""
        return min(max(self.vocab_size - self.offset, 0), self.weight_VD.shape[0])

    @property
    def true_weight(self) -> Tensor:
        """This shard without its padding rows, detached: the sweeps make gradients themselves."""
        return self.weight_VD.detach()[: self.num_true_rows]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of logits and statistics: float64 for a float64 head, else float32."""
        return torch.float64 if self.weight_VD.dtype == torch.float64 else torch.float32

    def chunks(self, num_tokens: int, *, num_heads: int = 1) -> list[slice]:
        """Split rows into the chunks of one sweep, which holds the logits of so many heads."""
        size = self.chunk_tokens
        if size is None:
            elements = CHUNK_ELEMENTS_GPU if self.weight_VD.is_cuda else CHUNK_ELEMENTS_CPU
            most = elements // num_heads // max(self.num_true_rows, 1)
            # Chunks of about one size: a short last one would be slow.
            even = math.ceil(num_tokens / math.ceil(num_tokens / max(most, CHUNK_ROW_MULTIPLE)))
            size = math.ceil(even / CHUNK_ROW_MULTIPLE) * CHUNK_ROW_MULTIPLE
        return [slice(s, min(s + size, num_tokens)) for s in range(0, num_tokens, size)]
