"""Text from a model in bulk: vLLM's engine fed from a stream, for work that has no trainer."""

import gc
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from megadistill.rollout.vllm_server import vllm_environment


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """A model, and what its engine may take."""

    model: Path
    precision: Literal["bf16", "fp32"]
    max_model_len: int
    gpu: bool
    tp: int = 1
    max_num_seqs: int = 256
    memory_fraction: float = 0.85
    kv_cache_gib: int = 1
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """One prompt."""

    key: int
    """Comes back with the response."""
    token_ids: Sequence[int]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the responses of a batch are drawn."""

    temperature: float
    top_p: float
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResponse:
    """What the model wrote to one prompt."""

    key: int
    token_ids: Sequence[int]
    finish_reason: Literal["stop", "length"]


class BatchEngine(Protocol):
    """What bulk work asks of an engine."""

    def generate(
        self, requests: Iterable[BatchRequest], sampling: Sampling
    ) -> Iterator[BatchResponse]:
        """Responses as they are finished; requests are taken as the engine has room."""

    def mean_nll(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[float]:
        """Mean -log p of the last `n` tokens of each (tokens, n), in nats."""

    def close(self) -> None:
        """Stop vLLM's workers."""


def start_batch_engine(settings: BatchSettings) -> BatchEngine:
    """Set the process up for vLLM, then import and start it."""
    os.environ.update(vllm_environment(settings.threads, gpu=settings.gpu))
    os.environ["HF_HUB_OFFLINE"] = "1"  # the model is a directory by now
    # Importing allocates millions of objects that live for ever: scanning them later, or
    # collecting meanwhile, costs seconds and frees nothing.
    gc.disable()
    if "sklearn" not in sys.modules:
        # transformers imports it, where installed, for a way of decoding that vLLM does not use.
        sys.modules["sklearn"] = None  # type: ignore[assignment]
    warnings.simplefilter("ignore", FutureWarning)
    from megadistill.rollout.vllm_batch import VllmBatch  # noqa: PLC0415 - reads the environment

    if sys.modules["sklearn"] is None:
        del sys.modules["sklearn"]
    gc.freeze()
    engine = VllmBatch(settings)
    gc.enable()
    return engine
