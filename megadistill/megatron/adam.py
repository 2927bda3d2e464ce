"""Adam for machines without Transformer Engine, shaped like its FusedAdam.

Megatron's distributed optimizer is written for FusedAdam: the step count belongs to a parameter
group, and a parameter's state is its two moments and nothing else. With `torch.optim.AdamW`, whose
state has a step tensor per parameter, saving before the first step fails, loading fails on that
tensor, and a loaded optimizer shares one step tensor between all parameters, so that every step
counts many times in the bias correction. This class has FusedAdam's state, and torch's kernel.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class GroupStepAdam(torch.optim.Optimizer):
    """Adam with decoupled (default) or L2 weight decay; `step` counts per parameter group."""

    def __init__(  # noqa: PLR0913 - FusedAdam's arguments, as Megatron passes them
        self,
        params: Iterable[dict[str, Any]],  # torch's own type of a parameter group
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert not capturable, "CUDA graphs need FusedAdam itself"
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, defaults)
        self._kernel = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` must be absent."""
        assert closure is None, "Megatron steps with ready gradients"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            self._update([p for p in group["params"] if p.grad is not None], group)

    def _update(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        self.create_state(params)
        gradients = [p.grad for p in params if p.grad is not None]
        states = [self.state[p] for p in params]
        # The kernel wants one counter per parameter; it reads them only.
        counts = [torch.tensor(float(group["step"]), device=p.device) for p in params]
        beta1, beta2 = group["betas"]
        self._kernel(
            params,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            counts,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def create_state(self, params: Iterable[torch.Tensor]) -> None:
        """Zero moments for the parameters that have none."""
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "exp_avg": torch.zeros_like(p, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
                }
