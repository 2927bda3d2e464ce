"""Frozen models come and go with their weights, on a CPU that plays the device."""

import pytest
import torch
from torch import nn

from megadistill.megatron.offload import TeacherOffloader

pytestmark = pytest.mark.megatron

CPU = torch.device("cpu")
NUM_BYTES = (3 * 4 + 3) * 4


def make_model(value: float) -> nn.Module:
    model = nn.Linear(4, 3)
    for parameter in model.parameters():
        parameter.requires_grad_(False).fill_(value)
    return model


def parked(count: int) -> tuple[TeacherOffloader, list[nn.Module], list[list[int]]]:
    """An offloader with models whose weights are 1, 2, ...; and where they lie on the host."""
    offloader = TeacherOffloader(CPU, moves=True)
    models = [make_model(index + 1.0) for index in range(count)]
    for index, model in enumerate(models):
        offloader.park(f"teacher-{index + 1}", model)
    return offloader, models, [places(model) for model in models]


def places(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def present(models: list[nn.Module], hosts: list[list[int]]) -> list[bool]:
    """Which models are on the device, after a look at every weight."""
    for index, model in enumerate(models):
        for parameter in model.parameters():
            assert bool((parameter == index + 1.0).all())
    return [places(model) != host for model, host in zip(models, hosts, strict=True)]


def test_one_model_at_a_time_is_there_with_its_weights() -> None:
    offloader, models, hosts = parked(3)
    assert present(models, hosts) == [False, False, False]
    for index in (0, 1, 1, 0, 2):
        with offloader.on_device(models[index]):
            assert present(models, hosts) == [place == index for place in range(3)]
        assert present(models, hosts)[index], "the last one stays until another wants the room"
    came = offloader.switches()
    assert [switch.model for switch in came] == ["teacher-1", "teacher-2", "teacher-1", "teacher-3"]
    assert all(switch.num_bytes == NUM_BYTES for switch in came)
    assert all(switch.seconds > 0 and switch.waited_s > 0 for switch in came)
    assert offloader.switches() == []


def test_two_models_may_be_wanted_together() -> None:
    offloader, models, hosts = parked(3)
    with offloader.on_device(models[0], models[2]):
        assert present(models, hosts) == [True, False, True]
    with offloader.on_device(models[2]):
        assert present(models, hosts) == [False, False, True]
    assert len(offloader.switches()) == 2


def test_a_student_is_nobodys_to_move() -> None:
    offloader, models, hosts = parked(1)
    student = make_model(7.0)
    here = places(student)
    with offloader.on_device(models[0]):
        offloader.prefetch(student)
        with offloader.on_device(student):
            assert present(models, hosts) == [True]
    assert places(student) == here
    assert [switch.model for switch in offloader.switches()] == ["teacher-1"]


def test_a_model_fetched_ahead_has_come_once() -> None:
    offloader, models, hosts = parked(3)
    with offloader.on_device(models[0]):
        pass
    offloader.prefetch(models[0])  # is there
    assert present(models, hosts) == [True, False, False]
    offloader.prefetch(models[1])
    offloader.prefetch(models[1])
    assert present(models, hosts) == [False, False, False], "its room is the last one's"
    with offloader.on_device(models[1]):
        assert present(models, hosts) == [False, True, False]
    assert [switch.model for switch in offloader.switches()] == ["teacher-1", "teacher-2"]


def test_another_model_than_the_one_fetched_ahead_may_be_wanted() -> None:
    offloader, models, hosts = parked(3)
    offloader.prefetch(models[1])
    with offloader.on_device(models[2]):
        assert present(models, hosts) == [False, False, True]
    offloader.prefetch(models[0])
    offloader.prefetch(models[1])
    with offloader.on_device(models[1]):
        assert present(models, hosts) == [False, True, False]
    came = [switch.model for switch in offloader.switches()]
    assert came == ["teacher-2", "teacher-3", "teacher-1", "teacher-2"]


def test_one_weight_of_a_model_that_is_away_can_be_had() -> None:
    offloader, models, hosts = parked(2)
    own = make_model(5.0)
    with offloader.on_device(models[0]):
        offloader.prefetch(models[0])
        for index, model in enumerate(models):
            for parameter in model.parameters():
                assert bool((offloader.weight(parameter) == index + 1.0).all())
        resident = next(iter(models[0].parameters()))
        assert offloader.weight(resident).data_ptr() == resident.data_ptr()
    offloader.prefetch(models[1])
    coming = next(iter(models[1].parameters()))
    assert bool((offloader.weight(coming) == 2.0).all()), "not the room that is being filled"
    free = next(iter(own.parameters()))
    assert offloader.weight(free).data_ptr() == free.data_ptr()
    assert present(models, hosts) == [False, False]


def test_on_a_cpu_nothing_moves() -> None:
    offloader = TeacherOffloader(CPU)
    model = make_model(1.0)
    here = places(model)
    offloader.park("teacher", model)
    offloader.prefetch(model)
    with offloader.on_device(model):
        assert places(model) == here
    assert offloader.switches() == []
