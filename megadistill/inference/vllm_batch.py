"""vLLM's synchronous engine for bulk work: kept full from a stream, whatever finishes comes out."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from megadistill.inference.requests import BatchRequest, BatchResponse, SamplingParams
from megadistill.rollout.model_files import eos_token_ids
from megadistill.rollout.vllm_arguments import IN_PROCESS, EngineSettings, vllm_arguments

QUEUED = 4
"""Requests given to the engine beyond those it decodes, in multiples of these: vLLM's scheduler
always finds one, and a stream of any length takes little memory."""


class VllmBatch:
    """One engine in this process."""

    def __init__(self, settings: EngineSettings) -> None:
        self._max_queued = QUEUED * settings.limits.max_num_seqs
        self._stop_ids = eos_token_ids(settings.model)
        arguments = vllm_arguments(settings) | IN_PROCESS
        if not settings.gpu:
            # OMP_NUM_THREADS may have come too late: whoever imported torch first has set the number.
            torch.set_num_threads(settings.limits.threads)
        self._engine = LLMEngine.from_engine_args(EngineArgs(str(settings.model), **arguments))

    def generate(
        self, requests: Iterable[BatchRequest], sampling: SamplingParams
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
        params = vllm.SamplingParams(
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
        self, requests: Iterable[tuple[BatchRequest, vllm.SamplingParams]]
    ) -> Iterator[RequestOutput]:
        waiting = iter(requests)
        while True:
            room = self._max_queued - self._engine.get_num_unfinished_requests()
            for request, params in islice(waiting, room):
                prompt = {"type": "token", "prompt_token_ids": list(request.token_ids)}
                self._engine.add_request(str(request.key), prompt, params)
            if not self._engine.has_unfinished_requests():
                return
            for output in self._engine.step():
                assert isinstance(output, RequestOutput)
                yield output

    def _params(self, request: BatchRequest, sampling: SamplingParams) -> vllm.SamplingParams:
        return vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            seed=request.seed,
            max_tokens=sampling.max_tokens,
            stop_token_ids=self._stop_ids,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
