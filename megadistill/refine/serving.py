"""Models that a shard serves for itself: one `vllm serve` each, on loopback, behind a token."""

import logging
import os
import secrets
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megadistill.config.refine import ServedConfig
from megadistill.convert.hf_files import resolve_model
from megadistill.launch.processes import Processes
from megadistill.launch.roles import visible_gpus
from megadistill.refine.endpoints import ChatModel, open_client
from megadistill.rollout.vllm_server import vllm_environment

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
POLL_S = 0.5
GRACE_S = 20.0


@contextmanager
def served(
    models: Mapping[str, ServedConfig], *, gpu: bool, logs: Path
) -> Iterator[dict[str, ChatModel]]:
    """Start the models side by side, each on its own GPUs, and end them with the block."""
    processes = Processes()
    token = secrets.token_urlsafe(32)
    try:
        ports, first = {}, 0
        for name, config in models.items():
            own = tuple(range(first, first + config.engine.tp)) if gpu else ()
            first += len(own)
            ports[name] = free_port()
            processes.start(
                name,
                serve_command(config, name, ports[name], gpu=gpu),
                serve_environment(config, token, own, gpu=gpu),
                logs / f"serve-{name}.log",
            )
        for name, config in models.items():
            wait_until_up(processes, ports[name], name, config.start_timeout_s)
        yield {
            name: ChatModel(
                name, name, open_client(f"http://{HOST}:{ports[name]}/v1", token), config
            )
            for name, config in models.items()
        }
    finally:
        processes.end(GRACE_S)
        processes.close()


def serve_command(config: ServedConfig, name: str, port: int, *, gpu: bool) -> list[str]:
    """The command line of one model's server; the token goes by the environment."""
    engine = config.engine
    words = {
        "--served-model-name": name,
        "--host": HOST,
        "--port": port,
        "--dtype": "float32" if config.precision == "fp32" else "bfloat16",
        "--max-model-len": config.max_model_len,
        "--max-num-seqs": engine.max_num_seqs,
        "--tensor-parallel-size": engine.tp,
        "--generation-config": "vllm",
    }
    if gpu:
        words["--gpu-memory-utilization"] = engine.memory_fraction
    command = [sys.executable, "-m", "megadistill.rollout.vllm_serve"]
    command += [str(resolve_model(config.path)), *(str(w) for pair in words.items() for w in pair)]
    if not gpu:
        # A prompt cut in two makes vLLM rewind its sampling generator, which a CPU cannot.
        command += ["--enforce-eager", "--no-enable-chunked-prefill", "--no-enable-prefix-caching"]
        command += ["--max-num-batched-tokens", str(max(config.max_model_len, 2048))]
    return [*command, *config.options]


def serve_environment(
    config: ServedConfig, token: str, gpus: tuple[int, ...], *, gpu: bool
) -> dict[str, str]:
    """The server's variables: its token, its GPUs or its threads."""
    environment = {**os.environ, **vllm_environment(config.engine.threads, gpu=gpu)}
    environment |= {"VLLM_API_KEY": token, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    # The front and the engine in one process would answer no request while the engine steps.
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    if gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus(gpus, os.environ))
    else:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(config.engine.kv_cache_gib)
    return environment


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_up(processes: Processes, port: int, name: str, timeout_s: float) -> None:
    """Until the server answers. Raises `ValueError` with its last lines when it cannot."""
    begun = time.monotonic()
    while not _answers(port):
        if exited := processes.next_exit(POLL_S):
            raise ValueError(f"models.{exited.name}: {exited.describe()}:\n{exited.tail()}")
        if time.monotonic() - begun > timeout_s:
            raise ValueError(
                f"models.{name}.start_timeout_s: the server was not up after {timeout_s:g} s"
            )
    log.info("%s: served after %.0f s", name, time.monotonic() - begun)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
