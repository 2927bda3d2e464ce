"""A Slurm of four nodes on this host that a test module starts for itself."""

import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCAL_CLUSTER = ROOT / "slurm" / "local_cluster.sh"
PATIENCE_S = 280.0
ASK_EVERY_S = 0.5
"""Between two questions to Slurm: each is a process, which the jobs under test would feel."""


@dataclass(frozen=True)
class Cluster:
    environment: dict[str, str]

    def call(self, *command: str, cwd: Path = ROOT) -> str:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, **self.environment},
            cwd=cwd,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def power(self, verb: str, node: int) -> None:
        self.call(str(LOCAL_CLUSTER), verb, str(node))

    def state(self, job: str) -> str:
        return self.call("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def wait_for_state(self, job: str, *states: str, patience_s: float = PATIENCE_S) -> None:
        def reached() -> bool:
            return self.state(job) in states

        wait_until(reached, lambda: self.state(job), patience_s, every_s=ASK_EVERY_S)


def wait_until(
    happened: Callable[[], bool],
    say: Callable[[], str] = str,
    patience_s: float = PATIENCE_S,
    every_s: float = 0.1,
) -> None:
    deadline = time.monotonic() + patience_s
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain: {say()}"
        time.sleep(every_s)


def free_port_range() -> int:
    """First of 400 ports, those of the daemons known to be free, for a cluster of our own.

    Test processes side by side draw from different ones: what one has found is not yet taken.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        first = random.randrange(10000 + 400 * (worker % 2), 17000, 800)
        with socket.socket() as control, socket.socket() as node:
            try:
                control.bind(("127.0.0.1", first))
                node.bind(("127.0.0.1", first + 1))
            except OSError:
                continue
        return first


@contextmanager
def local_cluster(**environment: str) -> Iterator[Cluster]:
    """Started on ports and in a directory of its own; `environment` is what its jobs see besides."""
    state = tempfile.mkdtemp(prefix="megadistill-test-")  # short: it holds a socket
    cluster = Cluster(
        environment={
            "MEGADISTILL_SLURM": state,
            "MEGADISTILL_SLURM_PORT": str(free_port_range()),
            **environment,
        }
    )
    try:
        cluster.call(str(LOCAL_CLUSTER), "start")
        cluster.environment["SLURM_CONF"] = f"{state}/slurm.conf"
        yield cluster
    finally:
        cluster.call(str(LOCAL_CLUSTER), "stop")
        shutil.rmtree(state)
