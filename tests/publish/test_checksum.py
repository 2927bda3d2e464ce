import pytest
import torch

from megadistill.publish.checksum import checksum, tensor_checksum

TENSORS = [("a", torch.arange(5000.0)), ("b", torch.ones(3, 4, dtype=torch.bfloat16))]


def test_order_does_not_change_the_checksum() -> None:
    assert checksum(TENSORS) == checksum(reversed(TENSORS))
    assert len(checksum(TENSORS)) == 16


def test_layout_in_memory_does_not_change_the_checksum() -> None:
    tensor = torch.randn(40, 300)
    assert tensor_checksum("x", tensor) == tensor_checksum("x", tensor.t().contiguous().t())


@pytest.mark.parametrize("index", [0, 1, 2041, 2042, 4999])
def test_one_changed_number_changes_the_checksum(index: int) -> None:
    changed = TENSORS[0][1].clone()
    changed[index] += 1
    assert tensor_checksum("a", changed) != tensor_checksum("a", TENSORS[0][1])


def test_exchanged_rows_change_the_checksum() -> None:
    tensor = torch.randn(64, 2048)
    assert tensor_checksum("x", tensor) != tensor_checksum("x", tensor[torch.arange(63, -1, -1)])


def test_name_dtype_and_shape_are_part_of_the_checksum() -> None:
    zeros = torch.zeros(4, 2)
    values = {
        tensor_checksum("x", zeros),
        tensor_checksum("y", zeros),
        tensor_checksum("x", zeros.view(2, 4)),
        tensor_checksum("x", zeros.view(torch.int32)),
    }
    assert len(values) == 4


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0)])
def test_scalars_and_empty_tensors_have_a_checksum(shape: tuple[int, ...]) -> None:
    assert 0 <= tensor_checksum("x", torch.zeros(shape)) < 2**64
