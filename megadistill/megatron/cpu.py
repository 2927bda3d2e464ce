"""Megatron-Core on a machine without CUDA: every workaround, each with its reason.

Megatron names CUDA in three ways: functions of `torch.cuda`, the literal device "cuda", and tensor
type names. `emulated_cuda` makes all three mean the CPU while Megatron runs, and leaves torch as it
was afterwards. With a GPU it does nothing. Settings that Megatron offers itself are no business of
this module: `model.py` sets them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

from megadistill.megatron.adam import GroupStepAdam

CPU = torch.device("cpu")

P = ParamSpec("P")
R = TypeVar("R")


class _CudaLiterals(TorchFunctionMode):
    """Reads `device="cuda"`, `pin_memory=True`, `.cuda()` and type names as their CPU meaning.

    Megatron's schedules, gradient clipping and optimizers create tensors on the literal device, its
    tied embeddings and context-parallel rotary tables call `.cuda()`, and its optimizers accept
    parameters only if `.type()` names a CUDA tensor. Costs some microseconds per torch call.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],  # torch passes any of its functions
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if not kwargs:
            return func(*args)
        kwargs = dict(kwargs)
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


class _Stream:
    """Stands in for `torch.cuda.Stream` and `Event`: a CPU has one stream, always complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accepts whatever a stream or an event is created with."""

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Whether all work is done."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record(self, stream: object = None) -> None:
        """Nothing to mark."""

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def record_event(self, event: object = None) -> "_Stream":
        """Nothing to mark."""
        return self


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A CPU is always synchronised, and its memory is not cached by torch."""


def _rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


# (owner, attribute, stand-in). The optimizer rows make Megatron believe in a FusedAdam, which
# `GroupStepAdam` is in all that matters; see adam.py for what goes wrong otherwise.
_STAND_INS: tuple[tuple[Any, str, Any], ...] = (
    (torch.cuda, "current_device", lambda: CPU),
    (torch.cuda, "synchronize", _nothing),
    (torch.cuda, "empty_cache", _nothing),
    (torch.cuda, "Stream", _Stream),
    (torch.cuda, "Event", _Stream),
    (torch.cuda, "current_stream", _Stream),
    (torch.cuda, "stream", lambda _stream: contextlib.nullcontext()),
    (torch.cuda, "manual_seed", torch.manual_seed),
    (torch.cuda, "get_rng_state", _rng_state),
    (torch.cuda, "set_rng_state", _set_rng_state),
    (megatron_random, "_get_cuda_rng_state", _rng_state),
    (megatron_random, "_set_cuda_rng_state", _set_rng_state),
    (megatron_optimizer, "Adam", GroupStepAdam),
    (megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False),
    (distrib_optimizer, "Adam", GroupStepAdam),
    (distrib_optimizer, "HAVE_APEX_OR_TE", True),
    (distrib_optimizer, "USING_APEX_OPTIMIZER", True),
)


@contextlib.contextmanager
def emulated_cuda() -> Iterator[None]:
    """Within it Megatron runs on the CPU; nothing happens where there is a GPU. Re-entrant."""
    if torch.cuda.is_available() or torch.cuda.current_device is _STAND_INS[0][2]:
        yield
        return
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in _STAND_INS]
    try:
        for owner, name, stand_in in _STAND_INS:
            setattr(owner, name, stand_in)
        with _CudaLiterals():
            yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def on_cpu_too(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that calls Megatron: where there is no GPU it runs on the CPU."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with emulated_cuda():
            return function(*args, **kwargs)

    return wrapper
