"""Micro-batches through the model: Megatron's pipeline schedule around our hidden-state head.

Shape legend: T packed tokens of this rank, W rows, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import get_model_config
from torch import Tensor

from megadistill.megatron.model import output_weight
from megadistill.megatron.world import World
from megadistill.types import MicroBatch

Result = TypeVar("Result")
Metrics = Mapping[str, Tensor]
Loss = Callable[[Tensor, MicroBatch], tuple[Tensor, Metrics]]
"""`(hidden_WD, micro-batch) -> (sum over rows, named sums)`."""


@torch.no_grad()
def forward(
    model: torch.nn.Module,
    batches: Sequence[MicroBatch],
    world: World,
    visit: Callable[[Tensor, MicroBatch], Result],
) -> list[Result]:
    """`visit(hidden_WD, micro-batch)` of every micro-batch, without gradient.

    Results exist on the last pipeline stage only; other stages return an empty list.
    """

    def collect(batch: MicroBatch, output: Tensor, non_loss_data: bool) -> Result:
        assert non_loss_data
        return visit(rows_of(output, batch, model, world), batch)

    return _run(model, batches, world, collect, forward_only=True, collect_non_loss_data=True)


def forward_backward(
    model: DistributedDataParallel, batches: Sequence[MicroBatch], world: World, loss: Loss
) -> list[tuple[Tensor, Metrics]]:
    """Add the gradient of the summed losses to the model's gradient buffers, and reduce them.

    Returns detached (loss, metrics) of each micro-batch with rows, on the last stage only.
    """

    def backward_from(batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, object]:
        report = None
        if len(batch.rows_W):
            total, metrics = loss(rows_of(output, batch, model, world), batch)
            report = (total.detach(), {name: value.detach() for name, value in metrics.items()})
        else:
            # Zeros keep the whole model and the head in the graph: their collectives, and the
            # reduction that waits for the gradient of every weight, run here as on other ranks.
            total = output.sum() * 0.0 + output_weight(model.module)[:1].sum() * 0.0
        return total, torch.zeros((), dtype=torch.int, device=total.device), report

    reports = _run(model, batches, world, backward_from, forward_only=False)
    return [report for report in reports if report is not None]


def rows_of(output: Tensor, batch: MicroBatch, model: torch.nn.Module, world: World) -> Tensor:
    """`[W, D]` hidden states of a micro-batch's rows from the last stage's output.

    Backward sums the tensor-parallel ranks' partial gradients, which is what the head leaves to do.
    """
    hidden: Tensor = output.squeeze(0)
    group = world.groups.tp
    if get_model_config(model).sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=group)
        return hidden.index_select(0, batch.rows_W)
    rows: Tensor = hidden.index_select(0, batch.rows_W)
    return copy_to_tensor_model_parallel_region(rows, group=group)  # type: ignore[no-any-return]


def _run(
    model: torch.nn.Module,
    batches: Sequence[MicroBatch],
    world: World,
    finish: Callable[..., Any],
    **options: bool,
) -> list[Any]:  # whatever `finish` reports, for every micro-batch
    def step(batches_left: Iterator[MicroBatch], module: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(batches_left)
        longest = int(batch.cu_seqlens.diff().max())  # read here, before it is on a GPU
        batch = _on(world.device, batch)
        packed = _packed_params(batch, longest) if world.groups.cp.size() == 1 else None
        output = module(
            batch.token_ids_T[None], batch.position_ids_T[None], None, packed_seq_params=packed
        )
        return output, partial(finish, batch)

    results: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        # Lengths vary: stages tell each other the shape of every hidden state they send.
        seq_length=len(batches[0].token_ids_T),
        micro_batch_size=1,
        **options,
    )
    return results


def _packed_params(batch: MicroBatch, longest: int) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _on(device: torch.device, batch: MicroBatch) -> MicroBatch:
    if device.type == "cpu":
        return batch
    tensors: dict[str, Any] = {
        name: value.to(device, non_blocking=True)
        for name in MicroBatch.__slots__
        if isinstance(value := getattr(batch, name), Tensor)
    }
    return replace(batch, **tensors)
