"""vLLM's synchronous engine for bulk work: kept full from a stream, whatever finishes comes out."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from megadistill.rollout.batch import BatchRequest, BatchResponse, BatchSettings, Sampling
from megadistill.rollout.model_files import eos_token_ids, kv_bytes_per_token, read_model_config
from megadistill.rollout.vllm_engine import CPU_BLOCK, PREFILL_TOKENS

QUEUED = 4
"""Requests given to the engine beyond those it decodes, in multiples of these: vLLM's scheduler
always finds one, and a stream of any length takes little memory."""


class VllmBatch:
    """One engine in this process."""

    def __init__(self, settings: BatchSettings) -> None:
        self._settings = settings
        self._stop_ids = eos_token_ids(settings.model)
        arguments = engine_arguments(settings)
        if not settings.gpu:
            # OMP_NUM_THREADS may have come too late: whoever imported torch first has set the number.
            torch.set_num_threads(settings.threads)
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))

    def generate(
        self, requests: Iterable[BatchRequest], sampling: Sampling
    ) -> Iterator[BatchResponse]:
        """Responses as they are finished."""
        for output in self._run((request, self._params(request, sampling)) for request in requests):
            completion = output.outputs[0]
            reason = completion.finish_reason
            assert reason in ("stop", "length"), f"vLLM finished a sequence with {reason!r}"
            yield BatchResponse(
                key=int(output.request_id),
                token_ids=list(completion.token_ids),
                finish_reason=reason,
            )

    def mean_nll(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[float]:
        """Mean -log p of the last `n` tokens of each (tokens, n), in nats."""
        params = SamplingParams(
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        requests = (
            (BatchRequest(key=key, token_ids=tokens, seed=0), params)
            for key, (tokens, _) in enumerate(sequences)
        )
        means = [float("nan")] * len(sequences)
        for output in self._run(requests):
            key = int(output.request_id)
            tokens, num_scored = sequences[key]
            assert output.prompt_logprobs is not None
            scored = list(zip(output.prompt_logprobs, tokens, strict=True))[-num_scored:]
            means[key] = -sum(entry[token].logprob for entry, token in scored) / num_scored
        return means

    def close(self) -> None:
        """Stop vLLM's workers."""
        self._engine.engine_core.shutdown()

    def _run(
        self, requests: Iterable[tuple[BatchRequest, SamplingParams]]
    ) -> Iterator[RequestOutput]:
        waiting = iter(requests)
        most = QUEUED * self._settings.max_num_seqs
        while True:
            room = most - self._engine.get_num_unfinished_requests()
            for request, params in islice(waiting, room):
                prompt = {"type": "token", "prompt_token_ids": list(request.token_ids)}
                self._engine.add_request(str(request.key), prompt, params)
            if not self._engine.has_unfinished_requests():
                return
            for output in self._engine.step():
                assert isinstance(output, RequestOutput)
                yield output

    def _params(self, request: BatchRequest, sampling: Sampling) -> SamplingParams:
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=request.seed,
            max_tokens=sampling.max_tokens,
            stop_token_ids=self._stop_ids,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def engine_arguments(settings: BatchSettings) -> dict[str, Any]:
    """vLLM's arguments (a dict because that is what `EngineArgs` takes)."""
    arguments: dict[str, Any] = {
        "model": str(settings.model),
        "dtype": "float32" if settings.precision == "fp32" else "bfloat16",
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tp,
        # Token ids go in and out; the end-of-sequence ids are read from the model's files.
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if settings.gpu:
        arguments["gpu_memory_utilization"] = settings.memory_fraction
        return arguments
    # Zeroing the cache is a good part of the start-up, so no more than can be filled.
    blocks = -(-settings.max_model_len // CPU_BLOCK) * settings.max_num_seqs + 1
    itemsize = torch.float32.itemsize if settings.precision == "fp32" else torch.bfloat16.itemsize
    needed = CPU_BLOCK * blocks * kv_bytes_per_token(read_model_config(settings.model), itemsize)
    arguments["kv_cache_memory_bytes"] = min(settings.kv_cache_gib << 30, needed)
    arguments["enforce_eager"] = True
    # A prompt cut in two makes vLLM rewind its sampling generator, which a CPU generator cannot.
    arguments["enable_chunked_prefill"] = False
    arguments["enable_prefix_caching"] = False
    arguments["max_num_batched_tokens"] = max(settings.max_model_len, PREFILL_TOKENS)
    return arguments
