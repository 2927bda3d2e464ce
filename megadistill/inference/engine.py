"""Text from a model in bulk: vLLM's engine in this process, fed from a stream."""

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from megadistill.imports import quick_imports
from megadistill.inference.requests import BatchRequest, BatchResponse, SamplingParams
from megadistill.rollout.vllm_arguments import EngineSettings, vllm_environment


class BatchEngine(Protocol):
    """The engine as bulk work sees it."""

    def generate(
        self, requests: Iterable[BatchRequest], sampling: SamplingParams
    ) -> Iterator[BatchResponse]:
        """Responses as they are finished; requests are taken as the engine has room."""

    def mean_nll(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[float]:
        """Mean -log p of the last `n` tokens of each (tokens, n), in nats."""

    def close(self) -> None:
        """Stop vLLM's workers."""


def start_batch_engine(settings: EngineSettings) -> BatchEngine:
    """Set the process up for vLLM, then import and start it."""
    os.environ.update(vllm_environment(settings.limits.threads, gpu=settings.gpu))
    os.environ["HF_HUB_OFFLINE"] = "1"  # the model is a directory by now
    warnings.simplefilter("ignore", FutureWarning)
    # transformers imports it, where installed, for a way of decoding that vLLM does not use;
    # whoever encodes sentences in this process later needs it.
    unused = {"sklearn"} - sys.modules.keys()
    with quick_imports(*unused):
        from megadistill.inference.vllm_batch import VllmBatch  # noqa: PLC0415 - reads the environment

        engine = VllmBatch(settings)
    for name in unused:
        del sys.modules[name]
    return engine
