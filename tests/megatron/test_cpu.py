import pytest
import torch

from megadistill.megatron import cpu
from megadistill.megatron.cpu import emulated_cuda

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(torch.cuda.is_available(), reason="emulates what is there"),
]


def test_cuda_means_the_cpu_within() -> None:
    with emulated_cuda():
        made = torch.zeros(2, device="cuda", pin_memory=True)
        assert made.is_cpu
        assert made.cuda() is made
        assert made.type() == "torch.cuda.FloatTensor"
        assert made.to(torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1, device=torch.cuda.current_device()).is_cpu
        torch.cuda.synchronize()
        stream = torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            stream.wait_stream(stream)


def test_torch_is_as_before_afterwards() -> None:
    originals = [getattr(owner, name) for owner, name, _ in cpu._STAND_INS]
    with emulated_cuda(), emulated_cuda():
        pass
    assert [getattr(owner, name) for owner, name, _ in cpu._STAND_INS] == originals
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_an_error_within_leaves_nothing_behind() -> None:
    with pytest.raises(LookupError), emulated_cuda():
        raise LookupError
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_random_states_are_the_cpus() -> None:
    with emulated_cuda():
        torch.cuda.manual_seed(3)
        state = torch.cuda.get_rng_state()
        drawn = torch.rand(1)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(1), drawn)
