import copy
from typing import Any

import pytest
import torch

from megadistill.megatron.adam import GroupStepAdam

pytestmark = pytest.mark.megatron


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(5, 3, generator=generator)) for _ in range(3)]


def take_steps(
    optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], num_steps: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize(
    ("adam_w_mode", "oracle"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)]
)
def test_it_steps_as_torch_does(adam_w_mode: bool, oracle: type[torch.optim.Optimizer]) -> None:
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    ours, theirs = parameters(), parameters()
    take_steps(
        GroupStepAdam([{"params": ours}], adam_w_mode=adam_w_mode, **settings), ours, 5, seed=1
    )
    take_steps(oracle([{"params": theirs}], **settings), theirs, 5, seed=1)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_loaded_state_goes_on_bit_for_bit() -> None:
    whole, first = parameters(), parameters()
    take_steps(GroupStepAdam([{"params": whole}], lr=1e-2), whole, 3, seed=1)
    stopped = GroupStepAdam([{"params": first}], lr=1e-2)
    take_steps(stopped, first, 3, seed=1)
    state = copy.deepcopy(stopped.state_dict())
    assert {frozenset(s) for s in state["state"].values()} == {frozenset({"exp_avg", "exp_avg_sq"})}
    assert state["param_groups"][0]["step"] == 3

    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = GroupStepAdam([{"params": second}], lr=1.0)
    resumed.load_state_dict(state)
    take_steps(stopped, first, 2, seed=2)
    take_steps(resumed, second, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_parameters_without_gradient_stay() -> None:
    params = parameters()
    optimizer = GroupStepAdam([{"params": params}], lr=1e-2)
    before = params[1].detach().clone()
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state
