"""The student: a model with data parallelism, the distributed optimizer, and one step of both."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from torch import Tensor

from megadistill.config.schema import OptimizerConfig
from megadistill.megatron.adam import GroupStepAdam
from megadistill.megatron.boundary import calls_megatron
from megadistill.megatron.schedule import Loss, forward_backward
from megadistill.megatron.world import World
from megadistill.types import MicroBatch


class Student:
    """The model that is trained: its parameters, gradients and optimizer state."""

    @calls_megatron
    def __init__(self, model: GPTModel, config: OptimizerConfig, world: World) -> None:
        """`model` with its weights loaded; the optimizer copies them to fp32 here."""
        self.world = world
        self.model = model
        self.parallel_model = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                # Always, so that there is one checkpoint format.
                use_distributed_optimizer=True,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=world.device.type == "cuda",
            ),
            model,
        )
        self._weight_decay = config.weight_decay
        self.optimizer = _optimizer(self.parallel_model, config)
        model.config.finalize_model_grads_func = _sum_gradients
        if world.device.type == "cuda":
            model.config.no_sync_func = self.parallel_model.no_sync

    @calls_megatron
    def step(
        self, batches: Sequence[MicroBatch], loss: Loss, learning_rate: float
    ) -> tuple[dict[str, float], float]:
        """One optimizer step on the sum of the losses of every rank's micro-batches.

        Returns the sums over all ranks (`loss` and the loss's metrics) and the gradient norm before
        clipping, equal on all ranks. Raises `FloatingPointError`, and changes no weight, if the
        loss is not finite.
        """
        self.parallel_model.train()
        self.parallel_model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = forward_backward(self.parallel_model, batches, self.world, loss)
        sums = self._sum_over_ranks(reports)
        if not math.isfinite(sums["loss"]):
            raise FloatingPointError(f"loss: found {sums['loss']}, expected a finite number")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            # Zero for norms and biases, which are not decayed.
            group["weight_decay"] = self._weight_decay * group["wd_mult"]
        _, grad_norm, _ = self.optimizer.step()
        return sums, float(grad_norm)

    def _sum_over_ranks(
        self, reports: Sequence[tuple[Tensor, Mapping[str, Tensor]]]
    ) -> dict[str, float]:
        """Sums of losses and metrics by name; a rank without rows knows no names of its own."""
        local: dict[str, float] = {"loss": 0.0}
        for total, metrics in reports if self.world.speaks else ():
            for name, value in [("loss", total), *metrics.items()]:
                local[name] = local.get(name, 0.0) + float(value)
        everywhere: list[dict[str, float]] = [{}] * self.world.size
        dist.all_gather_object(everywhere, local)
        names = sorted({name for part in everywhere for name in part})
        return {name: math.fsum(part.get(name, 0.0) for part in everywhere) for name in names}


def _optimizer(model: DistributedDataParallel, config: OptimizerConfig) -> MegatronOptimizer:
    precise = model.config.params_dtype == torch.float32
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            weight_decay=config.weight_decay,
            clip_grad=config.clip_grad,
            bf16=not precise,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=True,
        ),
        [model],
    )
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, GroupStepAdam):
            # A checkpoint may be written or read before the first step.
            for group in part.optimizer.param_groups:
                group["step"] = 0
                part.optimizer.create_state(group["params"])
    return optimizer


def _sum_gradients(models: list[Any], _num_tokens: Tensor, **groups: Any) -> None:
    """Reduce gradients over all groups; as sums, for weights already hold their normaliser."""
    finalize_model_grads(models, None, **groups)
