"""vLLM's synchronous engine, set up so that the same batch gives the same bits."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.config import WeightTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from megadistill.config import RunConfig
from megadistill.resolve import resolve
from megadistill.rollout import wire
from megadistill.rollout.model_files import eos_token_ids
from megadistill.rollout.serve import RequestError
from megadistill.rollout.vllm_arguments import IN_PROCESS, EngineSettings, vllm_arguments
from megadistill.rollout.vllm_worker import BACKEND, WorkerExtension

log = logging.getLogger(__name__)


class VllmEngine:
    """One engine with the student's weights; every method belongs to one thread."""

    def __init__(self, config: RunConfig, version: int, *, gpu: bool) -> None:
        assert config.rollout is not None, "an engine needs config.rollout"
        self.version = version
        self.checksum: str | None = None
        self._gpu = gpu
        self._colocated = config.rollout.placement == "colocated"
        settings = engine_settings(config, gpu=gpu)
        self._stop_ids = eos_token_ids(settings.model)
        arguments = engine_arguments(config, settings)
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._max_model_len: int = self._engine.model_config.max_model_len
        self._vocabulary: int = self._engine.model_config.get_vocab_size()
        self._engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})

    def generate(
        self, body: wire.Generate, cancelled: Callable[[], bool]
    ) -> Iterator[wire.Sequence | wire.Alive | wire.End]:
        """Sample all requests together; raises `RequestError` before any work is begun."""
        for request in body.requests:
            self._check(request)
        begun = beat = time.monotonic()
        # Everything is queued before the first step: an engine that started on the first
        # arrivals would batch differently each time, and bf16 sums depend on the batch.
        for request in body.requests:
            prompt = {"type": "token", "prompt_token_ids": request.token_ids}
            self._engine.add_request(str(request.id), prompt, self._params(request, body.sampling))
        num_tokens = 0
        while self._engine.has_unfinished_requests():
            if cancelled():
                self._engine.abort_request([str(request.id) for request in body.requests])
                log.warning("the client left: batch of %d dropped", len(body.requests))
                return
            for output in self._engine.step():
                sequence = self._sequence(output)
                num_tokens += len(sequence.token_ids)
                yield sequence
            if time.monotonic() - beat > wire.HEARTBEAT_S:
                beat = time.monotonic()
                yield wire.Alive(unfinished=self._engine.get_num_unfinished_requests())
        seconds = time.monotonic() - begun
        log.info(
            "version %d: %d sequences, %d tokens in %.2f s (%.0f tokens/s)",
            *(self.version, len(body.requests), num_tokens, seconds, num_tokens / seconds),
        )
        yield wire.End(count=len(body.requests))

    def load_weights(self, body: wire.Weights) -> wire.Loaded:
        """Replace the running model's weights; raises `RequestError` if a file is missing."""
        begun = time.monotonic()
        if absent := [file for file in body.files if not Path(file).is_file()]:
            raise RequestError(f"version {body.version}: no such file: {', '.join(absent)}")
        call = self._engine.collective_rpc
        call("start_weight_update")
        call("update_weights", kwargs={"update_info": {"files": body.files}})
        call("finish_weight_update")
        received = set(call("received_checksum"))
        if received != {body.checksum}:
            raise RuntimeError(
                f"version {body.version}: workers read checksums {sorted(received)}, "
                f"expected {body.checksum}"
            )
        self._engine.set_weight_version(str(body.version))
        self._engine.reset_prefix_cache()
        self.version, self.checksum = body.version, body.checksum
        seconds = time.monotonic() - begun
        log.info("version %d: weights loaded in %.2f s", body.version, seconds)
        return wire.Loaded(version=self.version, checksum=received.pop(), seconds=seconds)

    def sleep(self) -> None:
        """Move the weights to host memory and drop the cache; a CPU has nothing to free."""
        if self._gpu and self._colocated:
            self._engine.sleep(level=1)

    def wake(self) -> None:
        if self._gpu and self._colocated:
            self._engine.wake_up()

    def close(self) -> None:
        """Stop vLLM's workers."""
        self._engine.engine_core.shutdown()

    def _check(self, request: wire.Request) -> None:
        length = len(request.token_ids)
        if length >= self._max_model_len:
            raise RequestError(
                f"request {request.id}: found a prompt of {length} tokens, expected fewer than "
                f"the context of {self._max_model_len}; change rollout.max_model_len"
            )
        worst = max(request.token_ids, key=lambda token: (token < 0, token))
        if not 0 <= worst < self._vocabulary:
            raise RequestError(
                f"request {request.id}: found token id {worst}, "
                f"expected 0 to {self._vocabulary - 1}"
            )

    def _params(self, request: wire.Request, sampling: wire.Sampling) -> SamplingParams:
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=request.seed,
            max_tokens=min(request.max_tokens, self._max_model_len - len(request.token_ids)),
            stop_token_ids=self._stop_ids,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _sequence(self, output: Any) -> wire.Sequence:
        assert isinstance(output, RequestOutput)
        assert output.finished
        completion = output.outputs[0]
        reason = completion.finish_reason
        assert reason in ("stop", "length"), f"vLLM finished a sequence with {reason!r}"
        assert completion.logprobs is not None
        token_ids = list(completion.token_ids)
        chosen = zip(completion.logprobs, token_ids, strict=True)
        return wire.Sequence(
            id=int(output.request_id),
            token_ids=token_ids,
            logprobs=[entries[token].logprob for entries, token in chosen],
            finish_reason=reason,
            version=int(self.version),
        )


def engine_settings(config: RunConfig, *, gpu: bool) -> EngineSettings:
    """The student's engine as a run configures it."""
    rollout = config.rollout
    assert rollout is not None, "an engine needs config.rollout"
    precision = config.student.precision or config.precision
    return EngineSettings(
        model=resolve("model", config.student.path),
        precision="fp32" if precision == "fp32" else "bf16",
        max_model_len=rollout.max_model_len or config.data.max_prompt_tokens + rollout.max_tokens,
        gpu=gpu,
        limits=rollout,
    )


def engine_arguments(config: RunConfig, settings: EngineSettings) -> dict[str, Any]:
    """vLLM's arguments for rollouts (a dict because that is what `EngineArgs` takes)."""
    assert config.rollout is not None
    sleeps = settings.gpu and config.rollout.placement == "colocated"
    return {
        **vllm_arguments(settings),
        **IN_PROCESS,
        "model": str(settings.model),
        "seed": config.seed,
        # Log-probabilities of the distribution that was really sampled from.
        "logprobs_mode": "processed_logprobs",
        # A cached prefix changes how a prompt is cut into batches, and so its bits.
        "enable_prefix_caching": False,
        "enable_sleep_mode": sleeps,
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
    }
