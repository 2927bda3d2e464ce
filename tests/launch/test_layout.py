from typing import Any

import pytest

from megadistill.launch.layout import Layout, describe, layout
from tests.launch.configs import make_config

Expected = tuple[int, list[tuple[list[int], list[tuple[int, ...]]]]]
"""Trainer world; for each node its trainer ranks and the GPUs of its engines."""


def seen(plan: Layout) -> Expected:
    nodes = [
        ([role.index for role in node.trainers], [role.gpus for role in node.engines])
        for node in plan.nodes
    ]
    return plan.trainer_world, nodes


def ranks(first: int, last: int) -> list[int]:
    return list(range(first, last + 1))


ONES: list[tuple[int, ...]] = [(gpu,) for gpu in range(8)]
GPU_CASES: list[tuple[str, dict[str, Any], int, int, Expected]] = [
    (
        "the paper's run: engines on the last of 4 nodes",
        {
            "rollout": {"engines": 8, "tp": 1},
            "cluster": {"rollout_nodes": 1},
            "parallel": {"tp": 4},
        },
        4,
        8,
        (24, [(ranks(0, 7), []), (ranks(8, 15), []), (ranks(16, 23), []), ([], ONES)]),
    ),
    (
        "dedicated: two nodes of engines with tp 4, idle GPUs allowed",
        {"rollout": {"engines": 3, "tp": 4}, "cluster": {"rollout_nodes": 2}},
        3,
        8,
        (8, [(ranks(0, 7), []), ([], [(0, 1, 2, 3)]), ([], [(0, 1, 2, 3), (4, 5, 6, 7)])]),
    ),
    (
        "dedicated on one node shares it",
        {"rollout": {"engines": 2, "tp": 1}},
        1,
        8,
        (6, [(ranks(0, 5), [(6,), (7,)])]),
    ),
    (
        "split: engines on the last GPUs of the last node",
        {"rollout": {"engines": 2, "tp": 2, "placement": "split"}, "parallel": {"tp": 2}},
        2,
        8,
        (12, [(ranks(0, 7), []), (ranks(8, 11), [(4, 5), (6, 7)])]),
    ),
    (
        "colocated: engines share the trainers' GPUs",
        {"rollout": {"engines": 2, "tp": 2, "placement": "colocated"}, "parallel": {"dp": 8}},
        2,
        4,
        (8, [(ranks(0, 3), [(0, 1)]), (ranks(4, 7), [(0, 1)])]),
    ),
    (
        "sft has no engines",
        {"algorithm": {"kind": "sft", "pool": "all"}, "rollout": None, "parallel": {"pp": 2}},
        2,
        2,
        (4, [([0, 1], []), ([2, 3], [])]),
    ),
]


@pytest.mark.parametrize(
    ("changed", "nodes", "gpus", "expected"),
    [case[1:] for case in GPU_CASES],
    ids=[case[0] for case in GPU_CASES],
)
def test_gpu_layout(changed: dict[str, Any], nodes: int, gpus: int, expected: Expected) -> None:
    plan = layout(make_config(**changed), nodes, gpus)
    assert seen(plan) == expected
    trainers = [role for node in plan.nodes for role in node.trainers]
    assert [role.index for role in trainers] == list(range(plan.trainer_world))
    assert all(len(role.gpus) == 1 for role in trainers)


CPU_CASES: list[tuple[str, dict[str, Any], int, Expected]] = [
    ("one process of each on one node", {}, 1, (1, [([0], [()])])),
    ("an engine apart on two nodes", {}, 2, (1, [([0], []), ([], [()])])),
    (
        "a node to spare between them",
        {"parallel": {"dp": 2}},
        4,
        (2, [([0], []), ([1], []), ([], []), ([], [()])]),
    ),
    (
        "no node to spare: the engine on the last node beside a trainer",
        {"parallel": {"tp": 2, "pp": 2}},
        2,
        (4, [([0, 1], []), ([2, 3], [()])]),
    ),
    (
        "uneven blocks",
        {"parallel": {"dp": 3}, "rollout": {"engines": 3}},
        2,
        (3, [([0], [()]), ([1, 2], [(), ()])]),
    ),
    (
        "rollout nodes set aside though the trainers are many",
        {"parallel": {"dp": 4}, "cluster": {"rollout_nodes": 2}, "rollout": {"engines": 3}},
        3,
        (4, [([0, 1, 2, 3], []), ([], [()]), ([], [(), ()])]),
    ),
    (
        "rollout nodes mean nothing on one node",
        {"cluster": {"rollout_nodes": 1}},
        1,
        (1, [([0], [()])]),
    ),
]


@pytest.mark.parametrize(
    ("changed", "nodes", "expected"),
    [case[1:] for case in CPU_CASES],
    ids=[case[0] for case in CPU_CASES],
)
def test_cpu_layout(changed: dict[str, Any], nodes: int, expected: Expected) -> None:
    assert seen(layout(make_config(**changed), nodes, 0)) == expected


HETEROGENEOUS_CASES: list[tuple[str, dict[str, Any], int, int, int, Expected]] = [
    (
        "trainers on the first component, engines on the second's smaller nodes",
        {
            "rollout": {"engines": 3, "tp": 2},
            "cluster": {"rollout_gpus_per_node": 4},
            "parallel": {"tp": 8},
        },
        4,
        8,
        2,
        (
            16,
            [
                (ranks(0, 7), []),
                (ranks(8, 15), []),
                ([], [(0, 1)]),
                ([], [(0, 1), (2, 3)]),
            ],
        ),
    ),
    (
        "the second's nodes are like the first's unless said otherwise",
        {"rollout": {"engines": 8}, "cluster": {"rollout_nodes": 1}},
        2,
        8,
        1,
        (8, [(ranks(0, 7), []), ([], ONES)]),
    ),
    (
        "on CPUs, engines stay on the second component though the first has a node to spare",
        {"rollout": {"engines": 2}},
        3,
        0,
        1,
        (1, [([0], []), ([], []), ([], [(), ()])]),
    ),
]


@pytest.mark.parametrize(
    ("changed", "nodes", "gpus", "second", "expected"),
    [case[1:] for case in HETEROGENEOUS_CASES],
    ids=[case[0] for case in HETEROGENEOUS_CASES],
)
def test_the_layout_of_a_heterogeneous_job(
    changed: dict[str, Any], nodes: int, gpus: int, second: int, expected: Expected
) -> None:
    plan = layout(make_config(**changed), nodes, gpus, second_component=second)
    assert seen(plan) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rollout": {"placement": "split"}}, "rollout.placement: found split, expected dedicated"),
        (
            {"algorithm": {"kind": "sft", "pool": "all"}, "rollout": None},
            "rollout.placement: found none, expected dedicated",
        ),
        ({"cluster": {"rollout_nodes": 2}}, "cluster.rollout_nodes: found 2, expected 1 as in"),
        (
            {"rollout": {"tp": 8}, "cluster": {"rollout_gpus_per_node": 4}},
            "rollout.tp: found 8, expected at most 4",
        ),
    ],
)
def test_a_second_component_that_fits_nothing_is_refused(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layout(make_config(**changed), 3, 8, second_component=1)


@pytest.mark.parametrize(
    ("changed", "nodes", "gpus", "message"),
    [
        ({"parallel": {"tp": 3}}, 1, 8, "parallel: found tp 3 x pp 1 x cp 1 = 3, expected a div"),
        (
            {"parallel": {"dp": 3}, "rollout": {"placement": "colocated"}},
            1,
            8,
            r"parallel.dp: found 3, expected 8 \(8 trainer GPUs / 1\)",
        ),
        ({"rollout": {"tp": 16}}, 1, 8, "rollout.tp: found 16, expected at most 8"),
        (
            {"rollout": {"engines": 5, "tp": 4, "placement": "colocated"}},
            2,
            8,
            "rollout.engines: found 5 with rollout.tp 4, expected at most 4 on 2 node",
        ),
        ({}, 4, 8, "cluster.rollout_nodes: found 0, expected 1 to 3 of 4 node"),
        (
            {"cluster": {"rollout_nodes": 4}},
            4,
            8,
            "cluster.rollout_nodes: found 4, expected 1 to 3",
        ),
        (
            {"rollout": {"engines": 8, "placement": "split"}},
            2,
            8,
            "rollout.engines: found 8 with rollout.tp 1, expected less than 8 GPUs",
        ),
        (
            {"rollout": {"engines": 4, "placement": "split"}, "parallel": {"tp": 3}},
            2,
            8,
            "parallel.tp: found 3, expected a divisor of the 8 trainer GPUs of a node",
        ),
        (
            {"cluster": {"rollout_nodes": 2}},
            2,
            0,
            r"cluster.rollout_nodes: found 2, expected less than the 2 node\(s\)",
        ),
    ],
)
def test_an_impossible_layout_names_its_key(
    changed: dict[str, Any], nodes: int, gpus: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layout(make_config(**changed), nodes, gpus)


def test_a_layout_is_described_node_by_node() -> None:
    config = make_config(
        rollout={"engines": 2, "tp": 4}, cluster={"rollout_nodes": 1}, parallel={"tp": 2}
    )
    assert describe(layout(config, 3, 8)).splitlines() == [
        "node 0: trainer 0-7 on GPU 0-7",
        "node 1: trainer 8-15 on GPU 0-7",
        "node 2: engine 0 on GPU 0-3, engine 1 on GPU 4-7",
        "16 trainer rank(s), 2 engine(s), 3 node(s)",
    ]
