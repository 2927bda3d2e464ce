"""Backends: what a sweep does to a chunk of logits between its matrix products.

The products are the vendor's (MKL, oneDNN, cuBLAS) in every backend; a backend is the passes over
the [C, V] chunk, the only ones whose cost grows with T V and that a library does not have.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megadistill.head.rows import RowStatistics
from megadistill.head.vocabulary import VocabularyHead

if TYPE_CHECKING:
    from megadistill.head import torch_rows, triton_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Which divergence of student S and teacher T."""

    name: Literal["forward_kl", "reverse_kl", "jsd"]
    beta: float = 0.5
    """Weight of the teacher in the mixture of the JSD."""


class Backend(Protocol):
    """Logits are fp32 (fp64 for an fp64 head); tiles have the type of the head's weight."""

    def make_tile(self, logits_CV: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for a gradient tile, which may be the logits' own."""

    def statistics(self, logits_CV: Tensor, *, with_entropy: bool) -> RowStatistics:
        """This shard's statistics; the logits stay as they are."""

    def soften(
        self, logits_CV: Tensor, tile_CV: Tensor, group: ProcessGroup | None
    ) -> tuple[RowStatistics, Tensor]:
        """Statistics over all ranks, and the soft-max in the tile up to the returned row factors.

        The logits are lost.
        """

    def softmax_tile(
        self, logits_CV: Tensor, tile_CV: Tensor, total: RowStatistics, scale_C: Tensor
    ) -> None:
        """Write `scale * softmax` to the tile, the statistics being known; the logits are lost."""

    def divergence(
        self,
        kind: Divergence,
        logits: tuple[Tensor, Tensor],
        tile_CV: Tensor | None,
        group: ProcessGroup | None,
    ) -> Tensor:
        """Divergence of each row of student and teacher logits.

        With a tile its gradient on the student's logits goes there, and both logits are lost.
        """


def backend_of(head: VocabularyHead) -> Backend:
    """The backend that the head names, or the best for its device."""
    name = head.backend
    if name == "auto":
        name = "triton" if head.weight_VD.is_cuda and find_spec("triton") else "torch"
    return cast(Backend, import_module(f"megadistill.head.{name}_rows"))


if TYPE_CHECKING:
    _torch: Backend = torch_rows
    _triton: Backend = triton_rows
