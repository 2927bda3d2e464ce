"""One rollout engine as a process: `python -m megadistill.rollout.vllm_server RUN_DIR --index I`.

It loads the student, listens on the job's own interface, writes its address into the run
directory, and works until it is asked to shut down, gets SIGTERM, or loses its parent.
"""

import argparse
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import psutil

from megadistill.atomic import write_atomic
from megadistill.config import RunConfig
from megadistill.imports import quick_imports
from megadistill.resolve import local
from megadistill.rollout import wire
from megadistill.rollout.serve import EngineServer, HostedEngine
from megadistill.rollout.vllm_arguments import vllm_environment
from megadistill.rundir import RunDir

log = logging.getLogger("megadistill.rollout.vllm_server")

PARENT_POLL_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one engine to its end; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", help="directory of a run, with its config.yaml")
    parser.add_argument("--index", type=int, default=0, help="number of this engine, from 0")
    parser.add_argument("--version", type=int, default=0, help="version of the student's weights")
    options = parser.parse_args(arguments)
    logging.basicConfig(format=f"%(asctime)s engine {options.index}: %(message)s")
    logging.getLogger("megadistill").setLevel(logging.INFO)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    follow_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    serve(RunDir(Path(options.run_dir).absolute()), options.index, options.version)
    return 0


def serve(run: RunDir, index: int, version: int) -> None:
    """Start the engine, announce it, and work until the end; a failed start is announced too."""
    begun = time.time()
    host = "127.0.0.1"
    try:
        config = run.load_config()
        host = listen_address(config)
        server = EngineServer(start_engine(config, version), run.token(), host)
    except Exception as error:
        # The trainer waits for this file: an error in it spares it the whole start timeout.
        announce(run, index, host, 0, version, error=f"{type(error).__name__}: {error}")
        raise
    announce(run, index, host, server.server_port, version)
    log.info(
        "listening on %s:%d after %.1f s, weights version %d",
        *(host, server.server_port, time.time() - begun, version),
    )
    try:
        server.work()
    finally:
        server.engine.close()
        run.engine_file(index).unlink(missing_ok=True)


def start_engine(config: RunConfig, version: int) -> HostedEngine:
    """Set the process up for vLLM, then import and start it."""
    rollout = config.rollout
    if rollout is None:
        raise ValueError(f"rollout: missing, kind {config.algorithm.kind} needs no engine")
    gpu = config.device != "cpu" and config.cluster.gpus_per_node > 0
    os.environ.update(vllm_environment(rollout.threads, gpu=gpu))
    if local("model", config.student.path) is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore", FutureWarning)
    # They are for ways of decoding, for object detection and for sound, which we have no use for.
    with quick_imports("sklearn", "scipy"):
        from megadistill.rollout.vllm_engine import VllmEngine  # noqa: PLC0415 - reads the environment

        gc.freeze()
        return VllmEngine(config, version, gpu=gpu)


def listen_address(config: RunConfig) -> str:
    """The one interface that the job uses: `MEGADISTILL_HOST`, this node's name, or loopback."""
    if host := os.environ.get("MEGADISTILL_HOST"):
        return host
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", config.cluster.nodes))
    if nodes == 1:
        return "127.0.0.1"
    return socket.gethostbyname(os.environ.get("SLURMD_NODENAME", socket.gethostname()))


def announce(
    run: RunDir, index: int, host: str, port: int, version: int, error: str | None = None
) -> None:
    """Write `control/engine-INDEX.json` for the clients."""
    address = wire.EngineAddress(
        host=host,
        port=port,
        node=socket.gethostname(),
        pid=os.getpid(),
        version=version,
        started=time.time(),
        error=error,
    )
    write_atomic(run.engine_file(index), address.model_dump_json())


def follow_parent(other: int | None = None) -> None:
    """End this process when its parent dies, or `other`, so that no engine is left holding a GPU."""
    # PR_SET_PDEATHSIG would fire when the parent's *thread* ends, and launchers use threads.
    parent = os.getppid()
    watched = psutil.Process(parent if other is None else other)

    def poll() -> None:
        while os.getppid() == parent and watched.is_running():
            time.sleep(PARENT_POLL_S)
        log.error("the process %d is gone: exiting", watched.pid)
        os._exit(1)

    threading.Thread(target=poll, name="follow-parent", daemon=True).start()


if __name__ == "__main__":
    status = main()
    # Taking vLLM and torch apart module by module costs five seconds and frees nothing.
    logging.shutdown()
    os._exit(status)
