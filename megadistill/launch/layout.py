"""The layout of a job: a pure function from configuration, nodes and GPUs to roles.

A GPU run has one trainer rank per trainer GPU, in the order of nodes and GPUs; a CPU run has
tp x pp x cp x dp ranks dealt over the nodes in contiguous blocks. Engines follow
`rollout.placement`. The same call on every node gives the same layout, so nothing is negotiated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from megadistill.config import RunConfig
from megadistill.config.schema import ParallelConfig, RolloutConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """One process: a trainer rank, or an engine."""

    kind: Literal["trainer", "engine"]
    index: int
    """Global rank of a trainer, index of an engine."""
    gpus: tuple[int, ...] = ()
    """Numbers of its GPUs on its node; empty on a CPU."""

    @property
    def name(self) -> str:
        """Names its log file, e.g. `trainer-3`."""
        return f"{self.kind}-{self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePlan:
    """The roles of one node; none where there are more nodes than needed."""

    node: int
    roles: tuple[Role, ...] = ()

    @property
    def trainers(self) -> tuple[Role, ...]:
        return tuple(role for role in self.roles if role.kind == "trainer")

    @property
    def engines(self) -> tuple[Role, ...]:
        return tuple(role for role in self.roles if role.kind == "engine")

    def describe(self) -> str:
        """Its roles in one line."""
        parts = [f"engine {role.index} on {_place(role.gpus)}" for role in self.engines]
        if ranks := [role.index for role in self.trainers]:
            gpus = [gpu for role in self.trainers for gpu in role.gpus]
            parts.insert(0, f"trainer {span(ranks)} on {_place(gpus)}")
        return ", ".join(parts) or "idle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The roles of a run, node by node."""

    trainer_world: int
    """Number of trainer ranks of all nodes."""
    nodes: tuple[NodePlan, ...]


def layout(
    config: RunConfig, nodes: int, gpus_per_node: int, *, second_component: int = 0
) -> Layout:
    """Deal the roles of a run to `nodes` nodes with `gpus_per_node` GPUs each (0: a CPU run).

    Of a heterogeneous job the last `second_component` nodes are the second component's: engines
    live there, trainers on the first's; its nodes have `cluster.rollout_gpus_per_node` GPUs.
    Raises `ValueError`, naming the key, what was found and what was expected.
    """
    if second_component:
        _check_second_component(config, second_component)
    if gpus_per_node == 0:
        return _cpu_layout(config, nodes, second_component)
    trainer_gpus, engines = _gpu_split(config, nodes, gpus_per_node, second_component)
    world = sum(len(gpus) for gpus in trainer_gpus)
    _check_world(config.parallel, world, trainer_gpus)
    plans, rank = [], 0
    for node, gpus in enumerate(trainer_gpus):
        trainers = [
            Role(kind="trainer", index=rank + local, gpus=(gpu,)) for local, gpu in enumerate(gpus)
        ]
        plans.append(NodePlan(node=node, roles=(*trainers, *engines[node])))
        rank += len(gpus)
    return Layout(trainer_world=world, nodes=tuple(plans))


def _check_second_component(config: RunConfig, nodes: int) -> None:
    if config.rollout is None or config.rollout.placement != "dedicated":
        found = "none" if config.rollout is None else config.rollout.placement
        raise ValueError(
            f"rollout.placement: found {found}, expected dedicated in a heterogeneous job, whose "
            "second component is for engines"
        )
    if config.cluster.rollout_nodes not in (0, nodes):
        raise ValueError(
            f"cluster.rollout_nodes: found {config.cluster.rollout_nodes}, expected {nodes} as in "
            "the job's second component, or 0"
        )


def describe(plan: Layout) -> str:
    """The layout, a line a node, for the job's log and for dry runs."""
    lines = [f"node {node.node}: {node.describe()}" for node in plan.nodes]
    engines = sum(len(node.engines) for node in plan.nodes)
    total = f"{plan.trainer_world} trainer rank(s), {engines} engine(s), {len(plan.nodes)} node(s)"
    return "\n".join([*lines, total])


# --- GPU runs ---

Engines = list[tuple[Role, ...]]
"""The engines of each node."""


def _gpu_split(
    config: RunConfig, nodes: int, gpus_per_node: int, second_component: int
) -> tuple[list[Sequence[int]], Engines]:
    """The GPUs of each node's trainers, and each node's engines."""
    every_gpu: list[Sequence[int]] = [range(gpus_per_node) for _ in range(nodes)]
    rollout = config.rollout
    if rollout is None:
        return every_gpu, [() for _ in range(nodes)]
    engine_gpus = gpus_per_node
    if second_component:
        engine_gpus = config.cluster.rollout_gpus_per_node or gpus_per_node
    if rollout.tp > engine_gpus:
        raise ValueError(
            f"rollout.tp: found {rollout.tp}, expected at most {engine_gpus}: "
            "an engine lives on one node"
        )
    if rollout.placement == "colocated":
        return every_gpu, _deal_engines(rollout, range(nodes), nodes, range(gpus_per_node))
    apart = second_component or config.cluster.rollout_nodes
    if rollout.placement == "split" or (nodes == 1 and apart == 0):
        first = _first_engine_gpu(rollout, gpus_per_node)
        own = range(first, gpus_per_node)
        engines = _deal_engines(rollout, [nodes - 1], nodes, own)
        return [*every_gpu[:-1], range(first)], engines
    if not 1 <= apart < nodes:
        raise ValueError(
            f"cluster.rollout_nodes: found {apart}, expected 1 to {nodes - 1} of {nodes} node(s) "
            "for rollout.placement dedicated"
        )
    engines = _deal_engines(rollout, range(nodes - apart, nodes), nodes, range(engine_gpus))
    return [*every_gpu[:-apart], *([()] * apart)], engines


def _deal_engines(
    rollout: RolloutConfig, hosts: Sequence[int], nodes: int, gpus: Sequence[int]
) -> Engines:
    """Engines in contiguous blocks over the nodes `hosts`, each on some of these GPUs there."""
    room = len(hosts) * (len(gpus) // rollout.tp)
    if rollout.engines > room:
        raise ValueError(
            f"rollout.engines: found {rollout.engines} with rollout.tp {rollout.tp}, expected at "
            f"most {room} on {len(hosts)} node(s) of {len(gpus)} GPUs"
        )
    engines: Engines = [() for _ in range(nodes)]
    for host, block in zip(hosts, _blocks(rollout.engines, len(hosts)), strict=True):
        shares = [tuple(gpus[at * rollout.tp :][: rollout.tp]) for at in range(len(block))]
        engines[host] = tuple(
            Role(kind="engine", index=index, gpus=share)
            for index, share in zip(block, shares, strict=True)
        )
    return engines


def _first_engine_gpu(rollout: RolloutConfig, gpus_per_node: int) -> int:
    """Of a node whose last GPUs are the engines', the others the trainers'."""
    taken = rollout.engines * rollout.tp
    if taken >= gpus_per_node:
        raise ValueError(
            f"rollout.engines: found {rollout.engines} with rollout.tp {rollout.tp}, expected less "
            f"than {gpus_per_node} GPUs in all, so that trainers share the node; "
            "rollout.placement dedicated with cluster.rollout_nodes takes whole nodes"
        )
    return gpus_per_node - taken


def _check_world(
    parallel: ParallelConfig, world: int, trainer_gpus: Sequence[Sequence[int]]
) -> None:
    model_size = parallel.tp * parallel.pp * parallel.cp
    if world % model_size:
        raise ValueError(
            f"parallel: found tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} = "
            f"{model_size}, expected a divisor of the {world} trainer GPUs"
        )
    if parallel.dp not in (None, world // model_size):
        raise ValueError(
            f"parallel.dp: found {parallel.dp}, expected {world // model_size} "
            f"({world} trainer GPUs / {model_size}), or none to have it computed"
        )
    uneven = [len(gpus) for gpus in trainer_gpus if len(gpus) % parallel.tp]
    if uneven:
        raise ValueError(
            f"parallel.tp: found {parallel.tp}, expected a divisor of the {uneven[0]} trainer GPUs "
            "of a node: a tensor-parallel group stays on one node"
        )


# --- CPU runs ---


def _cpu_layout(config: RunConfig, nodes: int, second_component: int) -> Layout:
    """Engines on the last nodes, apart from the trainers when there are nodes to spare."""
    parallel = config.parallel
    world = parallel.tp * parallel.pp * parallel.cp * (parallel.dp or 1)
    apart = second_component or (config.cluster.rollout_nodes if nodes > 1 else 0)
    if apart >= nodes:
        raise ValueError(
            f"cluster.rollout_nodes: found {apart}, expected less than the {nodes} node(s)"
        )
    trainer_nodes = min(world, nodes - apart)
    roles: list[list[Role]] = [[] for _ in range(nodes)]
    for node, block in enumerate(_blocks(world, trainer_nodes)):
        roles[node] += [Role(kind="trainer", index=rank) for rank in block]
    num_engines = config.rollout.engines if config.rollout else 0
    hosts = min(num_engines, second_component or nodes - trainer_nodes or nodes)
    for context, block in enumerate(_blocks(num_engines, hosts)):
        roles[nodes - hosts + context] += [Role(kind="engine", index=index) for index in block]
    plans = tuple(NodePlan(node=node, roles=tuple(own)) for node, own in enumerate(roles))
    return Layout(trainer_world=world, nodes=plans)


def _blocks(count: int, parts: int) -> list[range]:
    """0 ... count-1 in `parts` contiguous blocks whose sizes differ by one at most."""
    edges = [part * count // parts for part in range(parts + 1)] if parts else [0]
    return [range(low, high) for low, high in pairwise(edges)]


def _place(gpus: Sequence[int]) -> str:
    return f"GPU {span(gpus)}" if gpus else "CPU"


def span(numbers: Sequence[int]) -> str:
    """`0-7` for a run of numbers, which all of ours are."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
