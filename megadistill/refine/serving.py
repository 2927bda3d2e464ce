"""Models that a shard serves for itself: one `vllm serve` each, on loopback, behind a token.

Under Slurm each is a job step.
"""

import logging
import os
import secrets
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
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
            command = serve_command(config, name, ports[name], gpu=gpu)
            environment = serve_environment(config, token, own, gpu=gpu)
            command = step_command(command, name, environment.get("CUDA_VISIBLE_DEVICES"))
            processes.start(name, command, environment, logs / f"serve-{name}.log")
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


def step_command(command: Sequence[str], name: str, gpus: str | None) -> list[str]:
    """In a task of a Slurm job: the command as a step of its own; elsewhere, or in a container, as it is.

    Slurm shows and accounts for each model, and none outlives the job. The steps overlap the task's,
    which holds the GPUs; `gpus` names the model's among them, since srun would say all.
    """
    in_container = "MEGADISTILL_HOSTS" in os.environ  # where a step would begin outside of it
    if "SLURM_STEP_ID" not in os.environ or in_container or shutil.which("srun") is None:
        return list(command)
    step = ["srun", f"--job-name=serve-{name}", f"--nodelist={os.environ['SLURMD_NODENAME']}"]
    step += ["--overlap", "--mem=0", "--nodes=1", "--ntasks=1", "--cpu-bind=none", "--input=none"]
    step.append("--export=ALL")  # whatever sbatch was told: the token goes by the environment
    # The warning that asks the shard to stop goes to every step; the model serves until it has.
    step += ["--quit-on-interrupt", "bash", "-c", 'trap "" USR1 USR2; exec "$@"', name]
    step += ["env", f"MEGADISTILL_ASKED_BY={os.getpid()}"]
    return [*step, *([] if gpus is None else [f"CUDA_VISIBLE_DEVICES={gpus}"]), *command]


def serve_environment(
    config: ServedConfig, token: str, gpus: tuple[int, ...], *, gpu: bool
) -> dict[str, str]:
    """The server's variables: its token, its GPUs or its threads."""
    environment = {**os.environ, **vllm_environment(config.engine.threads, gpu=gpu)}
    environment |= {"VLLM_API_KEY": token, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    for name in ("SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU"):
        environment.pop(name, None)  # srun takes no --mem beside them
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
