"""Where the entries of shards stand in the whole parameter, and which of them a rank owns, without ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from megadistill.convert.families import read_spec
from megadistill.convert.mapping import entries
from megadistill.megatron.sketch import _owned, _places, add
from megadistill.megatron.training import Student
from megadistill.megatron.world import World
from tests.megatron.jobs import ALL

pytestmark = pytest.mark.megatron


class Group:
    """A process group of which only size and place count."""

    def __init__(self, size: int, rank: int) -> None:
        self._size = size
        self._rank = rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", ALL)
def test_every_entry_of_a_shard_keeps_its_place_in_the_whole(
    models: Path, model: str, tp: int
) -> None:
    spec = read_spec(models / model)
    for entry in entries(spec):
        shape = entry.shape(spec)
        numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
        width = shape[1] if len(shape) > 1 else 1
        for rank in range(tp):
            groups = SimpleNamespace(tp=Group(tp, rank))
            world = cast(World, SimpleNamespace(groups=groups, device=torch.device("cpu")))
            rows_R, columns_C = _places(entry.layout, shape, world)
            found = (rows_R[:, None] * width + columns_C).flatten()
            expected = entry.layout.shard(numbers, tp, rank).flatten()
            assert found.shape == expected.shape
            known = expected > 0
            assert torch.equal(found[known], expected[known])
            assert (found[~known] < width).all(), "the first entry, and rows that pad a vocabulary"


def test_ranks_own_every_entry_once() -> None:
    """Two buckets with padding, cut over ranks that parameters lie across."""
    sizes = {"a": 5, "b": 7, "c": 11}
    places = {"a": (0, 5, 0), "b": (6, 13, 0), "c": (16, 27, 1)}
    data = torch.arange(28.0)
    buckets = [
        SimpleNamespace(offset=0, grad_data=data[:16], params_list=["a", "b"]),
        SimpleNamespace(offset=16, grad_data=data[16:], params_list=["c"]),
    ]
    buffer = SimpleNamespace(buckets=buckets, param_index_map=places)
    seen: dict[str, list[float]] = {name: [-1.0] * size for name, size in sizes.items()}
    for rank in range(4):
        student = SimpleNamespace(
            world=SimpleNamespace(groups=SimpleNamespace(dp_cp=Group(4, rank))),
            parallel_model=SimpleNamespace(buffers=[buffer]),
        )
        for name, start, values in _owned(cast(Student, student)):
            for offset, value in enumerate(values.tolist()):
                assert seen[name][start + offset] == -1, "owned twice"
                seen[name][start + offset] = value
    for name, (start, end, _) in places.items():
        assert seen[name] == data[start:end].tolist()


def test_sketches_of_pieces_add_up_and_names_keep_parameters_apart() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole, parts, other = (torch.zeros(2**16, dtype=torch.float64) for _ in range(3))
    add(whole, "a", torch.arange(1000), values)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    for piece in order.chunk(3):
        add(parts, "a", piece, values[piece])
    add(other, "b", torch.arange(1000), values)
    torch.testing.assert_close(parts, whole)
    assert whole.norm() == pytest.approx(float(values.norm()), rel=0.02)
    assert abs(float(whole @ other)) < 0.02 * float(values.norm()) ** 2
