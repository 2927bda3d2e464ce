"""A shard of a fan-out: one call whose output lies in a directory named by what it computes.

    ROOT/shards/KEY/shard.json      the call; KEY is its hash
    ROOT/shards/KEY/output/         belongs to the shard's function, which finds there what an earlier
                                    try left and goes on from it
    ROOT/shards/KEY/done.json       written last: never run again
    ROOT/shards/KEY/failures.jsonl  the failed tries since it was last submitted
    ROOT/shards/KEY/try-0.log ...   what every try printed

A try is a process of its own, `megadistill shard ROOT/shards/KEY`, so whatever kills it (a crash, a
signal, the kernel when memory runs out) is one failed try, no more.
"""

import hashlib
import importlib
import json
import os
import runpy
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from megadistill.atomic import write_atomic
from megadistill.launch.heartbeats import try_lock
from megadistill.launch.processes import Exit, Processes
from megadistill.launch.roles import visible_gpus

POLL_S = 0.2
GRACE_S = 30.0
"""A try that is ended has this long to save what it has, after SIGINT."""
LOCK_WAIT_S = 30.0
SHARD_DIRECTORY = "MEGADISTILL_SHARD_DIRECTORY"
"""Environment variable with the output directory, for shards that are commands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One call, `entry(directory, arguments)`, that can run anywhere and be repeated.

    Two shards with the same entry and arguments are the same work. What else the outcome depends
    on, such as the content of an input file, belongs into the arguments (see `fingerprint`).
    """

    entry: str
    """`package.module:function`, taking the output directory (a `Path`) and the arguments."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values (any: the function knows)."""
    label: str = ""
    """What people call it; no part of its identity."""

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that identify the work."""
        return content_hash({"entry": self.entry, "arguments": dict(self.arguments)})

    @property
    def name(self) -> str:
        """Unlike any other shard's, for people."""
        return f"{self.label} [{self.key}]" if self.label else self.key


def command_shard(words: Sequence[str], *, label: str = "", depends: Any = None) -> Shard:
    """A shard that is a `megadistill` command line; it finds its directory in the environment.

    `depends` (any JSON value) enters the shard's identity beside the words.
    """
    arguments = {"words": list(words), "depends": depends}
    return Shard(entry="megadistill.launch.shards:run_command", arguments=arguments, label=label)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardState:
    """What is known of a shard from its files."""

    name: str
    directory: Path
    """Where its output lies."""
    status: Literal["done", "failed", "unfinished"]
    """`failed`: every try it was granted has failed."""
    failures: int = 0
    detail: str = ""
    """How its last try ended and that one's last lines."""


@dataclass(frozen=True, slots=True)
class ShardFolder:
    """The files of one shard."""

    path: Path

    @classmethod
    def of(cls, root: Path, shard: Shard) -> "ShardFolder":
        return cls(root / "shards" / shard.key)

    @property
    def output(self) -> Path:
        return self.path / "output"

    @property
    def done_file(self) -> Path:
        return self.path / "done.json"

    @property
    def failures_file(self) -> Path:
        return self.path / "failures.jsonl"

    def create(self, shard: Shard) -> None:
        """Make the directory (mode 0700) and forget the failures of earlier submissions."""
        root = self.path.parents[1]
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in (root / "shards", self.path, self.output):
            directory.mkdir(mode=0o700, exist_ok=True)
        self.failures_file.unlink(missing_ok=True)
        values = {"entry": shard.entry, "arguments": dict(shard.arguments), "label": shard.label}
        # Not flushed to the disk, which can take seconds: it is written anew by every submission.
        write_atomic(self.path / "shard.json", json.dumps(values), sync=False)

    def read(self) -> Shard:
        return Shard(**json.loads((self.path / "shard.json").read_text()))

    def failures(self) -> list[dict[str, Any]]:
        if not self.failures_file.exists():
            return []
        return [json.loads(line) for line in self.failures_file.read_text().splitlines()]

    def has_work(self, tries: int) -> bool:
        """Whether it is neither done nor has failed so often."""
        return not self.done_file.exists() and len(self.failures()) < tries

    def add_failure(self, exited: Exit) -> None:
        values = {
            "what": f"{exited.describe()} on {socket.gethostname()}",
            "log": exited.log.name,
            "detail": exited.tail(),
        }
        with self.failures_file.open("a") as stream:
            stream.write(json.dumps(values) + "\n")

    def next_log(self) -> Path:
        return self.path / f"try-{len(list(self.path.glob('try-*.log')))}.log"

    def state(self, name: str, tries: int) -> ShardState:
        failures = self.failures()
        detail = ""
        if failures:
            last = failures[-1]
            detail = (
                f"{last['what']}; the last lines of {self.path / last['log']}:\n{last['detail']}"
            )
        status: Literal["done", "failed", "unfinished"] = "unfinished"
        if self.done_file.exists():
            status, detail = "done", ""
        elif len(failures) >= tries:
            status = "failed"
        return ShardState(
            name=name,
            directory=self.output,
            status=status,
            failures=len(failures),
            detail=detail,
        )


def run_shard(path: Path) -> None:
    """One try: call the shard's function; `done.json` says that it returned."""
    folder = ShardFolder(path)
    if folder.done_file.exists():
        return
    shard = folder.read()
    begun = time.time()
    load_entry(shard.entry)(folder.output, shard.arguments)
    values = {"seconds": round(time.time() - begun, 3), "host": socket.gethostname()}
    write_atomic(folder.done_file, json.dumps(values))


def load_entry(entry: str) -> Callable[[Path, Mapping[str, Any]], object]:
    """The function a shard names."""
    module, _, name = entry.partition(":")
    function: Callable[[Path, Mapping[str, Any]], object] = getattr(
        importlib.import_module(module), name
    )
    return function


def run_command(directory: Path, arguments: Mapping[str, Any]) -> None:
    """The entry of `command_shard`: a `megadistill` command line, as if typed, in this process."""
    os.environ[SHARD_DIRECTORY] = str(directory)
    sys.argv = ["megadistill", *arguments["words"]]
    try:
        runpy.run_module("megadistill", run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise


@dataclass(slots=True, kw_only=True)
class Worker:
    """Works shards off on this machine: `slots` at a time, each with its tries."""

    slots: int
    tries: int
    gpus: int = 0
    """GPUs of one slot; 0 leaves CUDA_VISIBLE_DEVICES alone."""
    stopped: Callable[[], bool] = lambda: False
    """Asked all the time whether to end the running tries and leave."""
    _processes: Processes = field(default_factory=Processes)
    _running: dict[str, tuple[ShardFolder, int]] = field(default_factory=dict)
    """Name of the process -> its shard and its slot."""

    def work(self, folders: Sequence[ShardFolder]) -> None:
        """Until every shard is done or has failed `tries` times, or until `stopped`."""
        waiting = deque(folder for folder in folders if folder.has_work(self.tries))
        with ExitStack() as stack:
            for folder in waiting:
                lock_shard(stack, folder)
            try:
                while (waiting or self._running) and not self.stopped():
                    while waiting and len(self._running) < self.slots:
                        self.start(waiting.popleft())
                    if exited := self._processes.next_exit(POLL_S):
                        waiting.extend(self.finish(exited))
            finally:
                self._processes.end(GRACE_S)
                self._processes.close()

    def start(self, folder: ShardFolder) -> None:
        taken = {slot for _, slot in self._running.values()}
        slot = next(slot for slot in range(self.slots) if slot not in taken)
        name = folder.read().name
        # Shards share cores: threads that spin while they wait would slow each other down.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUNBUFFERED": "1"}
        if self.gpus:
            own = tuple(range(slot * self.gpus, (slot + 1) * self.gpus))
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus(own, os.environ))
        command = [sys.executable, "-m", "megadistill", "shard", str(folder.path)]
        self._processes.start(name, command, environment, folder.next_log())
        self._running[name] = (folder, slot)

    def finish(self, exited: Exit) -> list[ShardFolder]:
        """Note a failed try; the shard again when it has tries left."""
        folder, _ = self._running.pop(exited.name)
        if folder.done_file.exists():
            say(f"{exited.name}: done")
            return []
        folder.add_failure(exited)
        left = self.tries - len(folder.failures())
        say(f"{exited.describe()}; {left} tries left; the last lines of {exited.log}:")
        say(exited.tail())
        return [folder] if left > 0 else []


def lock_shard(stack: ExitStack, folder: ShardFolder) -> None:
    """Hold the shard until the stack ends, so that nobody works on it at the same time."""
    lock: TextIO = stack.enter_context((folder.path / "lock").open("w"))
    deadline = time.monotonic() + LOCK_WAIT_S
    while not try_lock(lock.fileno()):
        if time.monotonic() > deadline:
            raise ValueError(
                f"{folder.path}: found another process at work on this shard, expected none; "
                "wait for it, or end it"
            )
        time.sleep(POLL_S)


def content_hash(values: Any) -> str:
    """Sixteen hexadecimal digits of what JSON (any value) says, independent of the keys' order."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(path: Path, most_bytes: int = 1 << 26) -> str:
    """Identifies a file's content, or a directory's; of large files the size and the time count."""
    if path.is_dir():
        names = sorted(file for file in path.rglob("*") if file.is_file())
        return content_hash([[str(f.relative_to(path)), fingerprint(f, most_bytes)] for f in names])
    found = path.stat()
    if found.st_size > most_bytes:
        return f"{found.st_size}-{found.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def say(text: str) -> None:
    """Into the job's output."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
