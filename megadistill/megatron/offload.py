"""Frozen models wait in pinned host memory while others work; on a CPU there is nothing to move."""

import contextlib
from collections.abc import Iterator, Sequence

import torch


class TeacherOffloader:
    """Keeps on the GPU the frozen models in use, or else the last ones used; the others wait on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host_copies: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._resident: list[torch.nn.Module] = []

    def park(self, model: torch.nn.Module) -> None:
        """Take a frozen model into this object's care and off the GPU."""
        if self._device.type != "cuda":
            return
        for parameter in model.parameters():
            assert not parameter.requires_grad
            self._host_copies[parameter] = parameter.data.cpu().pin_memory()
        self._leave(model)

    @contextlib.contextmanager
    def on_device(self, *models: torch.nn.Module) -> Iterator[None]:
        """Within it `models` are on the device; parked ones stay until others want the room."""
        self._settle([model for model in models if self._is_parked(model)])
        yield

    def _is_parked(self, model: torch.nn.Module) -> bool:
        return any(parameter in self._host_copies for parameter in model.parameters())

    def _settle(self, models: Sequence[torch.nn.Module]) -> None:
        if not models:
            return
        for model in self._resident:
            if model not in models:
                self._leave(model)
        for model in models:
            if model not in self._resident:
                self._enter(model)
        self._resident = list(models)

    def _leave(self, model: torch.nn.Module) -> None:
        """Give the GPU memory back; the host copy is still right, for frozen weights stay."""
        for parameter in model.parameters():
            parameter.data = self._host_copies[parameter]

    def _enter(self, model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data = self._host_copies[parameter].to(self._device, non_blocking=True)
