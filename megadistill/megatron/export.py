"""The model's weights as Hugging Face tensors, streamed to rank 0 one parameter at a time."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megadistill.convert.families import ModelSpec
from megadistill.convert.mapping import find_entry, to_hf
from megadistill.megatron.model import stage_layers
from megadistill.megatron.world import World

LAYERS = "decoder.layers."


def hf_tensors(
    parameters: Mapping[str, Tensor], spec: ModelSpec, world: World
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, CPU tensor) of every weight on rank 0; nothing on the other ranks.

    `parameters` are this rank's, by their names in the model. Collective: every rank must exhaust
    the iterator. Rank 0 holds one full parameter at a time.
    """
    if world.groups.dp_cp.rank() != 0:
        return
    own = {global_name(name, spec, world): p.detach() for name, p in parameters.items()}
    for stage, names in enumerate(_names_by_stage(own, spec, world)):
        for name in names:
            shards = _shards(own[name], world) if name in own else []
            if stage > 0 and world.groups.tp.rank() == 0:
                shards = _to_first_stage(shards, stage, world)
            if world.rank == 0:
                full = find_entry(spec, name).layout.unshard(shards)
                for hf_name, tensor in to_hf(spec, name, full):
                    yield hf_name, tensor.cpu()


def global_name(name: str, spec: ModelSpec, world: World) -> str:
    """A parameter of this stage by its name in the whole model."""
    if not name.startswith(LAYERS):
        return name
    number, rest = name.removeprefix(LAYERS).split(".", 1)
    return f"{LAYERS}{stage_layers(spec, world)[int(number)]}.{rest}"


def _names_by_stage(own: dict[str, Tensor], spec: ModelSpec, world: World) -> list[list[str]]:
    """Names of each stage's parameters, without the second copy of a tied embedding."""
    names: list[list[str]] = [[]] * world.groups.pp.size()
    dist.all_gather_object(names, [*own], group=world.groups.pp)
    skipped = {"output_layer.weight"} if spec.tied_embeddings else set()
    return [[name for name in stage if name not in skipped] for stage in names]


def _shards(parameter: Tensor, world: World) -> list[Tensor]:
    """The tensor-parallel shards of one parameter in rank order, on the group's first rank."""
    group = world.groups.tp
    if group.size() == 1:
        return [parameter]
    is_first = group.rank() == 0
    shards = [torch.empty_like(parameter) for _ in range(group.size())] if is_first else None
    dist.gather(parameter.contiguous(), shards, group=group, group_dst=0)
    return shards or []


def _to_first_stage(shards: list[Tensor], stage: int, world: World) -> list[Tensor]:
    """Send a later stage's shards to rank 0, which returns them."""
    group = world.groups.pp
    header: list[tuple[torch.Size, torch.dtype]] = [(s.shape, s.dtype) for s in shards]
    if group.rank() == stage:
        dist.send_object_list([header], group=group, group_dst=0)
        for shard in shards:
            dist.send(shard.contiguous(), group=group, group_dst=0)
    if group.rank() != 0:
        return []
    received: list[list[tuple[torch.Size, torch.dtype]]] = [[]]
    dist.recv_object_list(received, group=group, group_src=stage)
    arrived = []
    for shape, dtype in received[0]:
        shard = torch.empty(shape, dtype=dtype, device=world.device)
        dist.recv(shard, group=group, group_src=stage)
        arrived.append(shard)
    return arrived
