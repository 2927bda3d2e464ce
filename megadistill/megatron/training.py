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
from megadistill.megatron.megatron_call import calls_megatron
from megadistill.megatron.schedule import Loss, forward, forward_backward
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
    ) -> tuple[float, float, dict[str, float]]:
        """One optimizer step on the sum of the losses of every rank's micro-batches.

        Returns loss, gradient norm before clipping, and metrics; sums over all ranks, equal on all
        ranks. Raises `FloatingPointError`, and changes no weight, if loss or norm is not finite.
        """
        self.parallel_model.train()
        self.parallel_model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = forward_backward(self.parallel_model, batches, self.world, loss)
        total, metrics = self._sum_over_ranks(reports)
        self.optimizer.prepare_grads()
        _require_finite("loss, summed over the batch,", total)
        _require_finite("gradient norm before clipping", float(self.optimizer.get_grad_norm()))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            # Zero for norms and biases, which are not decayed.
            group["weight_decay"] = self._weight_decay * group["wd_mult"]
        _, grad_norm, _ = self.optimizer.step()
        return total, float(grad_norm), metrics

    @calls_megatron
    def gradient(self, batches: Sequence[MicroBatch], loss: Loss) -> None:
        """Leave the reduced gradient in the buffers, for others to read; changes no weight."""
        self.parallel_model.train()
        self.parallel_model.zero_grad_buffer()
        forward_backward(self.parallel_model, batches, self.world, loss)

    @calls_megatron
    def measure(self, batches: Sequence[MicroBatch], loss: Loss) -> dict[str, float]:
        """The metrics of `loss` summed over every rank's micro-batches, without gradient."""
        self.model.eval()
        reports = forward(
            self.model,
            batches,
            self.world,
            lambda hidden_WD, batch: loss(hidden_WD, batch) if len(batch.rows_W) else None,
        )
        return self._sum_over_ranks([report for report in reports if report])[1]

    def _sum_over_ranks(
        self, reports: Sequence[tuple[Tensor, Mapping[str, Tensor]]]
    ) -> tuple[float, dict[str, float]]:
        """Sum of losses, and of metrics by name; a rank without rows knows no names of its own."""
        local: list[tuple[str | None, float]] = []
        for total, metrics in reports if self.world.is_reporting_rank else ():
            local.append((None, float(total)))
            local += [(name, float(value)) for name, value in metrics.items()]
        everywhere: list[list[tuple[str | None, float]]] = [[]] * self.world.size
        dist.all_gather_object(everywhere, local)
        values: dict[str | None, list[float]] = {None: []}
        for part in everywhere:
            for name, value in part:
                values.setdefault(name, []).append(value)
        sums = {name: math.fsum(terms) for name, terms in values.items() if name is not None}
        return math.fsum(values[None]), sums


def _require_finite(name: str, number: float) -> None:
    if not math.isfinite(number):
        raise FloatingPointError(
            f"the step's {name} is {number}, expected a finite number; no weight was changed"
        )


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
