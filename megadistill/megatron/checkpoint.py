"""Checkpoints of the student: weights, optimizer and random states, readable at another layout."""

import json
import queue
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megadistill.megatron.megatron_call import calls_megatron
from megadistill.megatron.training import Student
from megadistill.megatron.world import World

Extra = Mapping[str, Any]  # JSON: whatever the caller must find again


@calls_megatron
def save(student: Student, directory: Path, extra: Extra) -> None:
    """Write the student's whole state, and `extra`, into an empty or new directory.

    Collective; rank 0's `directory` and `extra` count, and all ranks must reach that directory.
    `extra` must survive JSON. The caller makes the write atomic (write aside, rename).
    """
    if student.world.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
    texts = [str(directory), json.dumps(extra)]
    dist.broadcast_object_list(texts, src=0)
    state = _sharded_state(student, is_loading=False)
    state["extra"] = texts[1]
    state["random_states"] = _gather_random_states(student.world)
    # Copies of a weight on several data-parallel ranks: each rank writes its share of them.
    strategy = FullyParallelSaveStrategyWrapper(
        get_default_save_sharded_strategy(), student.world.groups.dp_cp
    )
    # Results come back through a queue. Megatron's lives in a process of its own, which takes ten
    # seconds to start and would outlive a killed trainer; writing is synchronous, so this one will do.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(state, texts[0], strategy, content_metadata=_stored_metadata())
    dist.barrier()


@calls_megatron
def load(student: Student, directory: Path) -> dict[str, Any]:
    """Restore what `save` wrote, at this layout, and return `extra`; collective.

    Random states return to ranks of the same number if there are as many ranks as when saving;
    else they stay as they are: nothing in a step draws from them.
    """
    if not (directory / "metadata.json").is_file():
        raise ValueError(f"{directory}: found no metadata.json, expected a Megatron checkpoint")
    wanted = _sharded_state(student, is_loading=True)
    state = dist_checkpointing.load(wanted, str(directory))
    student.model.load_state_dict(state["model"])
    with torch.no_grad():
        # Main parameters are leaves that want gradients; they are written in place.
        student.optimizer.load_state_dict(state["optimizer"])
    _restore_random_states(student.world, state["random_states"])
    extra: dict[str, Any] = json.loads(state["extra"])
    return extra


def _sharded_state(student: Student, *, is_loading: bool) -> ShardedStateDict:
    metadata = {**_stored_metadata(), "dp_cp_group": student.world.groups.dp_cp}
    _count_padding(student)
    model = student.model.sharded_state_dict(metadata=metadata)
    optimizer = student.optimizer.sharded_state_dict(
        model, is_loading=is_loading, metadata=metadata
    )
    return {"model": model, "optimizer": optimizer}


def _count_padding(student: Student) -> None:
    """Make the optimizer write every parameter's state from where it lies.

    Megatron joins the buckets of a buffer without the padding at their ends, and then looks up
    parameters by their places with it. Where a padded bucket is not the last (tied embeddings over
    pipeline stages, overlapped reduction) later parameters' states are saved shifted. A bucket that
    declares no padding is joined whole.
    """
    for buffer in student.parallel_model.buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def _stored_metadata() -> dict[str, Any]:
    return {
        # The one format that can be read at another tensor- or pipeline-parallel size.
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _gather_random_states(world: World) -> list[dict[str, Any]]:
    """Every rank's states, in rank order: all ranks must save the same common part."""
    own: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }
    if world.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state()
    states: list[dict[str, Any]] = [{}] * world.size
    dist.all_gather_object(states, own)
    return states


def _restore_random_states(world: World, states: list[dict[str, Any]]) -> None:
    if len(states) != world.size:
        return
    own = states[world.rank]
    torch.set_rng_state(own["torch"])
    get_cuda_rng_tracker().set_states(own["tracker"])
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"])
