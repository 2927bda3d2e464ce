"""Wraps calls into Megatron: emulated CUDA on a CPU, and no warnings about its own oddities."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from megadistill.megatron.cpu import on_cpu_too

P = ParamSpec("P")
R = TypeVar("R")

_ODDITIES = (
    # Checkpoints hold torch's ShardedTensor, which warns of its end whenever it is touched.
    "Please use DTensor instead",
    # With fp32 parameters the optimizer's shards are views, whose gradients it clears itself.
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    # Collectives under the names that they had before torch 2.13.
    "`torch.distributed.",
    # A single process reads a checkpoint without collectives, as it should.
    "torch.distributed is disabled, unavailable or uninitialized",
    "The argument order of load has been changed",
    # A default of its own configuration.
    "full scope is deprecated",
)


def calls_megatron(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that calls Megatron."""
    emulated = on_cpu_too(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with warnings.catch_warnings():
            for message in _ODDITIES:
                warnings.filterwarnings("ignore", message)
            return emulated(*args, **kwargs)

    return wrapper
