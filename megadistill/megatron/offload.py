"""Frozen models wait in pinned host memory while others work; on a CPU there is nothing to move."""

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megadistill.types import Switch


class TeacherOffloader:
    """Keeps on the device the frozen models in use, or else the last ones used; others wait on the host.

    One may be fetched ahead of its use: it takes the place of the last ones used.
    """

    def __init__(self, device: torch.device, *, moves: bool | None = None) -> None:
        """`moves`: whether models leave the device at all; they do where that is a GPU."""
        self._device = device
        self._moves = device.type == "cuda" if moves is None else moves
        self._names: dict[torch.nn.Module, str] = {}
        self._host_copies: dict[torch.nn.Parameter, Tensor] = {}
        self._resident: list[torch.nn.Module] = []
        self._coming: tuple[torch.nn.Module, _Fetch] | None = None
        self._switches: list[Switch] = []

    def park(self, name: str, model: torch.nn.Module) -> None:
        """Take a frozen model into this object's care and off the device."""
        if not self._moves:
            return
        self._names[model] = name
        for parameter in model.parameters():
            assert not parameter.requires_grad
            host = parameter.data.cpu()
            on_gpu = self._device.type == "cuda"
            self._host_copies[parameter] = host.pin_memory() if on_gpu else host
        self._leave(model)

    @contextlib.contextmanager
    def on_device(self, *models: torch.nn.Module) -> Iterator[None]:
        """Within it `models` are on the device; parked ones stay until others want the room."""
        self._settle([model for model in models if model in self._names])
        yield

    def prefetch(self, model: torch.nn.Module) -> None:
        """Begin to fetch a parked model that is wanted next, in the room of those that are there.

        The copy runs beside what the device computes.
        """
        if model not in self._names or model in self._resident:
            return
        if self._coming is not None and self._coming[0] is model:
            return
        self._await()
        for other in self._resident:
            self._leave(other)
        self._resident = []
        self._coming = model, self._fetch(model)

    def weight(self, parameter: torch.nn.Parameter) -> Tensor:
        """One parameter's values on the device, wherever its model is; a copy where that is away."""
        there = {p for model in self._resident for p in model.parameters()}
        if parameter in there or parameter not in self._host_copies:
            return parameter.detach()
        return self._host_copies[parameter].to(self._device, non_blocking=True)

    def switches(self) -> list[Switch]:
        """What was fetched since the last call, in order."""
        found, self._switches = self._switches, []
        return found

    def _settle(self, models: Sequence[torch.nn.Module]) -> None:
        if not models:
            return
        self._await()
        for model in self._resident:
            if model not in models:
                self._leave(model)
        for model in models:
            if model not in self._resident:
                self._coming = model, self._fetch(model)
                self._await()
        self._resident = list(models)

    def _fetch(self, model: torch.nn.Module) -> "_Fetch":
        return _Fetch({p: self._host_copies[p] for p in model.parameters()}, self._device)

    def _await(self) -> None:
        """Let a model that is on its way arrive."""
        if self._coming is None:
            return
        (model, fetch), self._coming = self._coming, None
        begun = time.perf_counter()
        seconds = fetch.finish()
        waited_s = time.perf_counter() - begun
        self._resident.append(model)
        self._switches.append(
            Switch(
                model=self._names[model],
                num_bytes=fetch.num_bytes,
                seconds=seconds,
                waited_s=waited_s,
            )
        )

    def _leave(self, model: torch.nn.Module) -> None:
        """Give the device's memory back; the host copy is still right, for frozen weights stay."""
        for parameter in model.parameters():
            parameter.data = self._host_copies[parameter]


class _Fetch:
    """The copy of a model's weights from the host, on a stream of its own where there are streams."""

    def __init__(self, host_copies: dict[torch.nn.Parameter, Tensor], device: torch.device) -> None:
        self.num_bytes = sum(host.nbytes for host in host_copies.values())
        self._rooms = {p: torch.empty_like(h, device=device) for p, h in host_copies.items()}
        self._begun = time.perf_counter()
        self._events: list[torch.cuda.Event] = []
        if device.type != "cuda":
            for parameter, host in host_copies.items():
                self._rooms[parameter].copy_(host)
            return
        # The room belongs to the stream that computes, and may have been another model's: the copy
        # begins when all that was queued before it is done.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        begun, done = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        with torch.cuda.stream(stream):
            begun.record(stream)
            for parameter, host in host_copies.items():
                self._rooms[parameter].copy_(host, non_blocking=True)
            done.record(stream)
        self._events = [begun, done]

    def finish(self) -> float:
        """Wait, put the weights in their places, and return the seconds that the copy took."""
        seconds = time.perf_counter() - self._begun
        if self._events:
            begun, done = self._events
            done.synchronize()
            seconds = begun.elapsed_time(done) / 1000
        for parameter, room in self._rooms.items():
            parameter.data = room
        return seconds
