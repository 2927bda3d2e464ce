"""vLLM's synchronous engine, set up so that the same batch gives the same bits."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import WeightTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from megadistill.config import RunConfig
from megadistill.convert.hf_files import resolve_model
from megadistill.rollout import wire
from megadistill.rollout.model_files import eos_token_ids, kv_bytes_per_token, read_model_config
from megadistill.rollout.serve import RequestError
from megadistill.rollout.vllm_worker import BACKEND, WorkerExtension

log = logging.getLogger(__name__)

CPU_BLOCK = 128
"""Tokens in one block of vLLM's key/value cache on a CPU."""

PREFILL_TOKENS = 2048
"""Most prompt tokens in one engine step on a CPU, unless one prompt is longer."""


class VllmEngine:
    """One engine with the student's weights; every method belongs to one thread."""

    def __init__(self, config: RunConfig, version: int, *, gpu: bool) -> None:
        assert config.rollout is not None, "an engine needs config.rollout"
        self.version = version
        self.checksum: str | None = None
        self._gpu = gpu
        self._colocated = config.rollout.placement == "colocated"
        path = resolve_model(config.student.path)
        self._stop_ids = eos_token_ids(path)
        arguments = engine_arguments(config, path, gpu=gpu)
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


def engine_arguments(config: RunConfig, path: Path, *, gpu: bool) -> dict[str, Any]:
    """vLLM's arguments (a dict because that is what `EngineArgs` takes)."""
    rollout = config.rollout
    assert rollout is not None
    precision = config.student.precision or config.precision
    max_model_len = rollout.max_model_len or config.data.max_prompt_tokens + rollout.max_tokens
    extension = f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"
    arguments: dict[str, Any] = {
        "model": str(path),
        "dtype": "float32" if precision == "fp32" else "bfloat16",
        "max_model_len": max_model_len,
        "max_num_seqs": rollout.max_num_seqs,
        "tensor_parallel_size": rollout.tp,
        "seed": config.seed,
        # Token ids go in and out; the end-of-sequence ids are read from the model's files.
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        # Log-probabilities of the distribution that was really sampled from.
        "logprobs_mode": "processed_logprobs",
        # A cached prefix changes how a prompt is cut into batches, and so its bits.
        "enable_prefix_caching": False,
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "worker_extension_cls": extension,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if gpu:
        arguments["gpu_memory_utilization"] = rollout.memory_fraction
        arguments["enable_sleep_mode"] = rollout.placement == "colocated"
        return arguments
    # Zeroing the cache is a good part of the start-up, so no more than can be filled.
    block_tokens = CPU_BLOCK * (-(-max_model_len // CPU_BLOCK) * rollout.max_num_seqs + 1)
    bytes_per_value = torch.float32.itemsize if precision == "fp32" else torch.bfloat16.itemsize
    needed = block_tokens * kv_bytes_per_token(read_model_config(path), bytes_per_value)
    arguments["kv_cache_memory_bytes"] = min(rollout.kv_cache_gib << 30, needed)
    arguments["enforce_eager"] = True
    # A prompt cut in two makes vLLM rewind its sampling generator, which a CPU generator cannot.
    arguments["enable_chunked_prefill"] = False
    arguments["max_num_batched_tokens"] = max(max_model_len, PREFILL_TOKENS)
    return arguments
