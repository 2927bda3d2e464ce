"""Arguments and environment with which vLLM is started, for every engine and server of ours.

Imports neither vLLM nor torch: both read the environment when they are imported.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from megadistill.config.refine import EngineConfig, ServedConfig
from megadistill.resolve import resolve
from megadistill.rollout.model_files import kv_bytes_per_token, read_model_config

CPU_BLOCK = 128
"""Tokens in one block of vLLM's key/value cache on a CPU."""
PREFILL_TOKENS = 2048
"""Most prompt tokens in one engine step on a CPU, unless one prompt is longer."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
BYTES = {"fp32": 4, "bf16": 2}
IN_PROCESS = {
    # Token ids go in and out; the end-of-sequence ids are read from the model's files.
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
    "use_tqdm_on_load": False,
}
"""Further arguments of an engine in this process, without a server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """A model, and the limits of its engine."""

    model: Path
    precision: Literal["bf16", "fp32"]
    max_model_len: int
    gpu: bool
    limits: EngineConfig

    @classmethod
    def of(cls, model: ServedConfig, *, gpu: bool, max_model_len: int | None = None) -> Self:
        """Of a model that a shard serves or writes with; raises `ValueError` if it is not here."""
        return cls(
            model=resolve("model", model.path),
            precision=model.precision,
            max_model_len=max_model_len or model.max_model_len,
            gpu=gpu,
            limits=model.engine,
        )


def vllm_arguments(settings: EngineSettings) -> dict[str, Any]:
    """vLLM's arguments, the model aside (a dict because that is what `EngineArgs` takes)."""
    limits = settings.limits
    arguments: dict[str, Any] = {
        "dtype": DTYPES[settings.precision],
        "max_model_len": settings.max_model_len,
        "max_num_seqs": limits.max_num_seqs,
        "tensor_parallel_size": limits.tp,
        "generation_config": "vllm",
    }
    if settings.gpu:
        return arguments | {"gpu_memory_utilization": limits.memory_fraction}
    # Zeroing the cache is a good part of the start-up, so no more than can be filled.
    blocks = -(-settings.max_model_len // CPU_BLOCK) * limits.max_num_seqs + 1
    per_token = kv_bytes_per_token(read_model_config(settings.model), BYTES[settings.precision])
    return arguments | {
        "kv_cache_memory_bytes": min(limits.kv_cache_gib << 30, CPU_BLOCK * blocks * per_token),
        "enforce_eager": True,
        # A prompt cut in two makes vLLM rewind its sampling generator, which a CPU generator cannot.
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": max(settings.max_model_len, PREFILL_TOKENS),
    }


def vllm_environment(threads: int, *, gpu: bool) -> dict[str, str]:
    """Variables that vLLM, torch and the hub read when they are imported."""
    environment = {
        # The engine lives in this process; its workers (tp > 1) are vLLM's own.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not gpu:
        environment |= {
            "OMP_NUM_THREADS": str(threads),
            # Threads that spin while they wait slow each other down eightfold on shared cores.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # vLLM compiles one function of its sampler even when eager: 30 s the first time,
            # and it needs a C++ compiler.
            "TORCHDYNAMO_DISABLE": "1",
        }
    return environment
