"""A gradient in few numbers that keeps norms and dot products: CountSketch.

Every entry goes, with a random sign, into one of M buckets. Both follow from the name of its parameter and
its place in it, whatever the layout, so that the sketches of shards add up like the gradients they stand for.
Shape legend: M buckets, P entries, R rows and C columns of a rank's shard.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadistill.convert.families import ModelSpec
from megadistill.convert.mapping import Replicated, find_entry
from megadistill.megatron.export import global_name
from megadistill.megatron.training import Student
from megadistill.megatron.world import World
from megadistill.types import FloatArray

NUM_BUCKETS = 2**16
"""Norms and dot products then have a relative error of about half a percent."""

BLOCK = 1 << 22
"""Entries that are hashed at once."""


def gradient_sketch(student: Student, spec: ModelSpec) -> FloatArray:
    """fp32 `[M]` of the gradient that the buffers hold, reduced; equal on every rank. Collective.

    Every entry is counted by the one rank that owns its reduced value. Raises `FloatingPointError`
    if one is not finite.
    """
    world = student.world
    total_M = torch.zeros(NUM_BUCKETS, dtype=torch.float64, device=world.device)
    names = {parameter: name for name, parameter in student.model.named_parameters()}
    for parameter, start, values_P in _owned(student):
        name = global_name(names[parameter], spec, world)
        if name == "output_layer.weight" and spec.tied_embeddings:
            continue  # the first stage's embedding holds the same sum
        entry = find_entry(spec, name)
        if world.groups.tp.rank() and type(entry.layout) is Replicated:  # others are kinds of it
            continue
        rows_R, columns_C = _places(entry.layout, entry.shape(spec), world)
        width = entry.shape(spec)[1:] or (1,)
        for first, block_P in enumerate(torch.split(values_P, BLOCK)):
            local_P = start + first * BLOCK + torch.arange(len(block_P), device=world.device)
            row_P, column_P = local_P // len(columns_C), local_P % len(columns_C)
            add(total_M, name, rows_R[row_P] * width[0] + columns_C[column_P], block_P)
    dist.all_reduce(total_M)
    if not total_M.isfinite().all():
        raise FloatingPointError("the gradient to sketch: found an entry that is not finite")
    sketched: FloatArray = total_M.float().cpu().numpy()
    return sketched


def add(total_M: Tensor, name: str, index_P: Tensor, values_P: Tensor) -> None:
    """Put entries of the parameter `name`, at these places of the whole of it, into their buckets."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    hash_P = _splitmix(index_P, seed)
    signs_P = 1.0 - 2.0 * (hash_P >> 16 & 1).double()
    total_M.index_add_(0, hash_P & NUM_BUCKETS - 1, signs_P * values_P.double())


def _owned(student: Student) -> Iterator[tuple[Any, int, Tensor]]:
    """(parameter, first entry, gradients from there) of what this rank's piece of each bucket holds.

    After the reduction a data-parallel rank has the sum in its own piece of a bucket alone.
    """
    group = student.world.groups.dp_cp
    for buffer in student.parallel_model.buffers:
        for bucket in buffer.buckets:
            size = bucket.grad_data.numel() // group.size()
            piece = bucket.offset + group.rank() * size
            for parameter in bucket.params_list:
                start, end, _ = buffer.param_index_map[parameter]
                low, high = max(start, piece), min(end, piece + size)
                if low < high:
                    grads = bucket.grad_data[low - bucket.offset : high - bucket.offset]
                    yield parameter, low - start, grads


def _places(layout: Any, shape: tuple[int, ...], world: World) -> tuple[Tensor, Tensor]:
    """Where the rows and columns of this rank's shard stand in the whole parameter.

    Rows that pad a vocabulary are called 0: their gradient is.
    """
    tp, rank, device = world.groups.tp.size(), world.groups.tp.rank(), world.device
    num_columns = shape[1] if len(shape) > 1 else 1
    # As few columns, and then rows, as every layout can cut.
    rows = torch.arange(shape[0], device=device)[:, None].expand(-1, tp)
    columns = torch.arange(num_columns, device=device).expand(2 * tp, -1)
    return layout.shard(rows, tp, rank)[:, 0], layout.shard(columns, tp, rank)[0]


def _splitmix(index_P: Tensor, seed: int) -> Tensor:
    """SplitMix64 (Steele, Lea, Flood 2014): the `index`-th number of a stream, in wrapping int64."""
    hash_P = seed + (index_P + 1) * _signed(0x9E3779B97F4A7C15)
    hash_P = (hash_P ^ _shifted(hash_P, 30)) * _signed(0xBF58476D1CE4E5B9)
    hash_P = (hash_P ^ _shifted(hash_P, 27)) * _signed(0x94D049BB133111EB)
    return hash_P ^ _shifted(hash_P, 31)


def _shifted(hash_P: Tensor, bits: int) -> Tensor:
    return hash_P >> bits & (1 << 64 - bits) - 1  # torch's own shift copies the sign


def _signed(number: int) -> int:
    return number - (1 << 64)
