"""Gradient sums of a sweep, and how backward hands them out."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadistill.head.projection import add_weight_gradient, hidden_gradient, is_narrow, row_blocks
from megadistill.head.vocabulary import VocabularyHead


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSums:
    """Hidden gradient in hidden's type, weight gradient in fp32; None where nobody asked."""

    hidden_TD: Tensor | None
    weight_VD: Tensor | None

    @classmethod
    def start(
        cls, head: VocabularyHead, hidden_TD: Tensor, *, for_hidden: bool, for_weight: bool
    ) -> "GradientSums":
        """Allocate the sums of one sweep."""
        weight_VD = head.weight_VD
        return cls(
            hidden_TD=torch.empty_like(hidden_TD) if for_hidden else None,
            weight_VD=(
                torch.zeros(weight_VD.shape, dtype=head.compute_dtype, device=weight_VD.device)
                if for_weight
                else None
            ),
        )

    @property
    def wanted(self) -> bool:
        """Whether any gradient was asked for."""
        return self.hidden_TD is not None or self.weight_VD is not None

    def tile(self, logits_CV: Tensor, head: VocabularyHead) -> Tensor:
        """What the gradient products read: the logits' own memory, or a copy as bf16 as the head."""
        if self.wanted and is_narrow(head.weight_VD):
            return torch.empty_like(logits_CV, dtype=head.weight_VD.dtype)
        return logits_CV

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

    def keep(self, ctx: Any) -> None:  # torch types no context
        """Save for backward: autograd drops what it saved right after, plain attributes later."""
        ctx.save_for_backward(self.hidden_TD, self.weight_VD)

    @classmethod
    def kept(cls, ctx: Any) -> "GradientSums":
        """The sums that `keep` saved."""
        hidden_TD, weight_VD = ctx.saved_tensors
        return cls(hidden_TD=hidden_TD, weight_VD=weight_VD)

    def hand_out(
        self, head: VocabularyHead, upstream: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both gradients times the upstream scalar, the weight's as the head wants it."""
        return self._hand_out_hidden(head, upstream), self._hand_out_weight(head, upstream)

    def _hand_out_hidden(self, head: VocabularyHead, upstream: Tensor | None) -> Tensor | None:
        """This rank's partial sum unless the head reduces it."""
        gradient_TD = self.hidden_TD
        if gradient_TD is None:
            return None
        if upstream is not None:
            gradient_TD = gradient_TD * upstream.to(gradient_TD.dtype)
        if head.reduce_hidden_gradient and head.group is not None:
            dist.all_reduce(gradient_TD, group=head.group)
        return gradient_TD

    def _hand_out_weight(self, head: VocabularyHead, upstream: Tensor | None) -> Tensor | None:
        """Returned in the weight's type, or added to Megatron's main_grad."""
        gradient_VD, weight_VD = self.weight_VD, head.weight_VD
        if gradient_VD is None:
            return None
        if head.accumulate_into_main_grad:
            scale = gradient_VD.new_ones(()) if upstream is None else upstream
            weight_VD.main_grad.addcmul_(gradient_VD, scale)  # type: ignore[attr-defined]
            return announce_main_grad(weight_VD)
        if upstream is None or bool(upstream == 1.0):
            # As it is where the types agree: autograd takes it over without a copy.
            return gradient_VD.to(weight_VD.dtype)
        returned_VD = torch.empty_like(weight_VD)
        for block in row_blocks(returned_VD):
            returned_VD[block] = gradient_VD[block] * upstream
        return returned_VD


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
