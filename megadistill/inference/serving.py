"""Models to talk to: behind an endpoint, or served by the shard itself while it needs them.

A served model is one `vllm serve` on loopback behind a token; under Slurm a job step of its own.
"""

import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2

from megadistill.config.refine import ChatModelConfig, EndpointConfig, ServedConfig
from megadistill.inference.chat import ChatModel, open_endpoint
from megadistill.launch.node_context import free_port
from megadistill.launch.processes import Processes
from megadistill.launch.roles import visible_gpus
from megadistill.rollout.vllm_arguments import EngineSettings, vllm_arguments, vllm_environment

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
POLL_S = 0.5
GRACE_S = 20.0


@contextmanager
def open_models(
    models: Mapping[str, ChatModelConfig], *, gpu: bool, logs: Path
) -> Iterator[dict[str, ChatModel]]:
    """Models by name; those of kind `serve` run while the block lasts, each on its own GPUs."""
    processes = Processes()
    token = secrets.token_urlsafe(32)
    opened: dict[str, ChatModel] = {}
    num_gpus = 0
    try:
        for name, config in models.items():
            if isinstance(config, EndpointConfig):
                opened[name] = open_endpoint(name, config)
                continue
            own = tuple(range(num_gpus, num_gpus + config.engine.tp)) if gpu else ()
            num_gpus += len(own)
            port = free_port()
            command = serve_command(config, name, port, gpu=gpu)
            environment = serve_environment(config, token, own, gpu=gpu)
            command = step_command(command, name, environment.get("CUDA_VISIBLE_DEVICES"))
            processes.start(name, command, environment, logs / f"serve-{name}.log")
            opened[name] = ChatModel(name, name, f"http://{HOST}:{port}/v1", token, config)
        for name, config in models.items():
            if isinstance(config, ServedConfig):
                wait_until_up(processes, opened[name], config.start_timeout_s)
        yield opened
    finally:
        processes.end(GRACE_S)
        processes.close()


def serve_command(config: ServedConfig, name: str, port: int, *, gpu: bool) -> list[str]:
    """The command line of one model's server; the token goes by the environment."""
    settings = EngineSettings.of(config, gpu=gpu)
    words = {"served_model_name": name, "host": HOST, "port": port, **vllm_arguments(settings)}
    command = [sys.executable, "-m", "megadistill.inference.vllm_serve", str(settings.model)]
    for word, value in words.items():
        option = word.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{option}" if value else f"--no-{option}")
        else:
            command += [f"--{option}", str(value)]
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
    return environment


def wait_until_up(processes: Processes, model: ChatModel, timeout_s: float) -> None:
    """Until the server answers. Raises `ValueError` with its last lines when it cannot."""
    begun = time.monotonic()
    while not _answers(model.base_url.removesuffix("v1") + "health"):
        if exited := processes.next_exit(POLL_S):
            raise ValueError(f"models.{exited.name}: {exited.describe()}:\n{exited.tail()}")
        if time.monotonic() - begun > timeout_s:
            raise ValueError(
                f"models.{model.name}.start_timeout_s: the server was not up after {timeout_s:g} s"
            )
    log.info("%s: served after %.0f s", model.name, time.monotonic() - begun)


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5, trust_env=False).is_success  # through no proxy
    except httpx2.RequestError:
        return False
