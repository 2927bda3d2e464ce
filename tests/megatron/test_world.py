"""Where this process computes."""

import pytest
import torch

from megadistill.megatron.world import pick_device

pytestmark = pytest.mark.megatron


@pytest.mark.parametrize(("wanted", "gpus_per_node"), [("auto", 0), ("cpu", 0), ("cpu", 8)])
def test_a_cpu_run_is_one_on_request_or_without_gpus(wanted: str, gpus_per_node: int) -> None:
    assert pick_device(wanted, gpus_per_node).type == "cpu"


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_gpus_that_torch_does_not_see_are_an_error(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster run on a node without a driver would otherwise train on its CPU for days."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^device: .*gpus_per_node = 8.*torch.version.cuda is"):
        pick_device(wanted, 8)
