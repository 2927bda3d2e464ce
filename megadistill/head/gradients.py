"""Gradient sums of a sweep, and how backward hands them out."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadistill.head.projection import add_weight_gradient, hidden_gradient
from megadistill.head.vocabulary import VocabularyHead


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSums:
    """Hidden gradient in hidden's type, weight gradient in fp32; None where nobody asked."""

    hidden_TD: Tensor | None
    weight_VD: Tensor | None
    """A sum of its own, or Megatron's main_grad."""

    @classmethod
    def start(
        cls, head: VocabularyHead, hidden_TD: Tensor, *, for_hidden: bool, for_weight: bool
    ) -> "GradientSums":
        """Allocate the sums of one sweep."""
        weight_VD = None
        if for_weight:
            weight_VD = main_grad(head)
            if weight_VD is None:
                weight_VD = torch.zeros_like(head.weight_VD, dtype=head.compute_dtype)
        return cls(
            hidden_TD=torch.empty_like(hidden_TD) if for_hidden else None,
            weight_VD=weight_VD,
        )

    @property
    def wanted(self) -> bool:
        """Whether any gradient was asked for."""
        return self.hidden_TD is not None or self.weight_VD is not None

    def add(
        self,
        head: VocabularyHead,
        hidden_TD: Tensor,
        rows: slice,
        tile_CV: Tensor,
        scale_C: Tensor | None = None,
    ) -> None:
        """Take the gradient `scale * tile` on one chunk's logits to hidden and weight.

        The row factor goes on the small operands, never on the tile.
        """
        hidden_CD = hidden_TD[rows]
        if self.hidden_TD is not None:
            partial_CD = hidden_gradient(tile_CV, head.true_weight)
            self.hidden_TD[rows] = partial_CD if scale_C is None else partial_CD * scale_C[:, None]
        if self.weight_VD is not None:
            if scale_C is not None:
                hidden_CD = (hidden_CD * scale_C[:, None]).to(tile_CV.dtype)
            add_weight_gradient(self.weight_VD[: head.num_true_rows], tile_CV, hidden_CD)

    def keep(self, ctx: Any, head: VocabularyHead) -> None:  # torch types no context
        """Save for backward: autograd drops what it saved right after, plain attributes later."""
        own = None if head.accumulate_into_main_grad else self.weight_VD
        ctx.save_for_backward(self.hidden_TD, own)
        ctx.head = head

    @classmethod
    def kept(cls, ctx: Any, upstream: Tensor) -> "GradientSums":
        """The sums that `keep` saved, times the upstream gradient."""
        hidden_TD, weight_VD = ctx.saved_tensors
        if bool(upstream == 1.0):
            if ctx.needs_input_grad[1] and weight_VD is None:
                weight_VD = main_grad(ctx.head)
            return cls(hidden_TD=hidden_TD, weight_VD=weight_VD)
        if ctx.head.accumulate_into_main_grad:
            raise ValueError(
                f"main_grad already holds the gradient of this sum, but backward came with the "
                f"factor {float(upstream)}; put factors into the row weights"
            )
        if hidden_TD is not None:
            hidden_TD = hidden_TD * upstream.to(hidden_TD.dtype)
        if weight_VD is not None:
            weight_VD = weight_VD * upstream
        return cls(hidden_TD=hidden_TD, weight_VD=weight_VD)

    def hand_out(self, head: VocabularyHead) -> tuple[Tensor | None, Tensor | None]:
        """Both gradients as autograd wants them; the hidden one is a partial sum over ranks, unless
        the head reduces it."""
        hidden_TD, weight_VD = self.hidden_TD, self.weight_VD
        if hidden_TD is not None and head.reduce_hidden_gradient and head.group is not None:
            dist.all_reduce(hidden_TD, group=head.group)
        if weight_VD is None:
            return hidden_TD, None
        if head.accumulate_into_main_grad:
            return hidden_TD, announce_main_grad(head.weight_VD)
        return hidden_TD, weight_VD.to(head.weight_VD.dtype)


def main_grad(head: VocabularyHead) -> Tensor | None:
    """Megatron's gradient buffer of the weight, where the head is to use it."""
    if not head.accumulate_into_main_grad:
        return None
    buffer_VD: Tensor = head.weight_VD.main_grad  # type: ignore[attr-defined]
    if buffer_VD.dtype != head.compute_dtype:
        raise ValueError(f"main_grad must be {head.compute_dtype}, found {buffer_VD.dtype}")
    return buffer_VD


def announce_main_grad(weight_VD: Tensor) -> Tensor | None:
    """Tell Megatron's data parallelism that main_grad already holds this gradient.

    Its hook runs only if some gradient arrives, and ignores the value when the parameter's
    `grad_added_to_main_grad` is set; `zero_out_wgrad` (tied embeddings) asks for zeros because
    that hook then adds the value all the same. A bare parameter with a main_grad needs neither.
    """
    attributes = vars(weight_VD)
    if "grad_added_to_main_grad" not in attributes:
        return None
    weight_VD.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if attributes.get("zero_out_wgrad", False):
        return torch.zeros_like(weight_VD)
    return torch.empty_like(weight_VD)
