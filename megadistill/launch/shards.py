"""A shard: one call of a function whose output lies in a directory named by what it computes.

    ROOT/shards/KEY/shard.json      the call; KEY is its hash
    ROOT/shards/KEY/output/         belongs to the shard's function, which finds there what an earlier
                                    try left and goes on from it
    ROOT/shards/KEY/done.json       written last: never run again
    ROOT/shards/KEY/failures.jsonl  the failed tries since it was last submitted
    ROOT/shards/KEY/waits.json      the jobs for whose end it waits, to be run again after them
    ROOT/shards/KEY/try-0.log ...   what every try printed

A try is a process of its own, `megadistill shard ROOT/shards/KEY`, so whatever kills it (a crash, a
signal, the kernel when memory runs out) is one failed try, no more.
"""

import hashlib
import importlib
import json
import logging
import os
import socket
import sys
import time
import typing
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    WrapSerializer,
)

from megadistill.atomic import write_atomic
from megadistill.launch.processes import Exit, Processes, say
from megadistill.launch.roles import visible_gpus
from megadistill.launch.shared_files import held_lock, read_json, try_lock
from megadistill.launch.stopping import STOPPED, StopRequest
from megadistill.metrics import read_json_lines

POLL_S = 0.2
GRACE_S = 30.0
"""A try that is ended has this long to save what it has, after SIGINT."""
LOCK_WAIT_S = 30.0
OUTPUT = "MEGADISTILL_SHARD_OUTPUT"
"""Environment variable of a shard's process: the output directory."""
MAY_WAIT = "MEGADISTILL_SHARD_MAY_WAIT"
"""Another: not empty, it may end with `STOPPED` to be run again after the jobs it says."""

FAILED = "failed"
"""File in a shard's output: some of it has failed for reasons that may pass. The shard is done, but
whoever asks for its stage again has it run again, for that part."""
EARLIER = "earlier.json"
"""File of a stage: the shards that lie there and are none of its any more, whose rows may be used."""
FOR_KEY = "key"
"""Context in which arguments are dumped to be hashed."""
T = TypeVar("T")


def _unless_for_key(
    value: Any, dump: SerializerFunctionWrapHandler, info: SerializationInfo
) -> Any:
    return None if info.context == FOR_KEY else dump(value)


Runtime = Annotated[T, WrapSerializer(_unless_for_key)]
"""A field of a shard's arguments that says how to compute; no result depends on it, nor the key."""


class ShardArguments(BaseModel):
    """What a shard's function is told, or a part of it: the base of one class for each function."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Upstream(ShardArguments):
    """Other shards that a shard reads; of its identity are their keys, not what they made."""

    root: Runtime[Path]
    """Of their stage."""
    keys: tuple[str, ...]

    @property
    def outputs(self) -> list[Path]:
        return [self.root / "shards" / key / "output" for key in self.keys]


class KnownFile(ShardArguments):
    """A file or directory that a shard reads; of its identity is the content, not the place."""

    path: Runtime[Path]
    content: str

    @classmethod
    def of(cls, path: Path) -> Self:
        return cls(path=path.absolute(), content=fingerprint(path))


Arguments = TypeVar("Arguments", bound=ShardArguments)


@dataclass(frozen=True, kw_only=True)
class Shard(Generic[Arguments]):
    """One call, `function(directory, arguments)`, that can run anywhere and be repeated.

    Two shards with the same function and arguments are the same work. What else the outcome depends
    on, such as the content of an input file, belongs into the arguments (see `fingerprint`); of other
    shards their keys do, not what they made, so that shards can be named before those have run.
    """

    function: Callable[[Path, Arguments], object]
    """Of a module; takes the output directory and the arguments, by whose annotation they are read."""
    arguments: Arguments
    label: str = ""
    """What people call it; no part of its identity, as is all that follows but the version."""
    gpus: int | None = None
    """GPUs it uses; absent: those of its job, or of this machine."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of its process beside those it inherits."""
    version: int = 1
    """Changes when the function computes something else from the same arguments."""

    @property
    def entry(self) -> str:
        return f"{self.function.__module__}:{self.function.__qualname__}"

    @cached_property
    def key(self) -> str:
        """Sixteen hexadecimal digits that identify the work."""
        arguments = self.arguments.model_dump(mode="json", context=FOR_KEY)
        return content_hash({"entry": self.entry, "version": self.version, "arguments": arguments})

    @property
    def name(self) -> str:
        """Unlike any other shard's, for people."""
        return f"{self.label} [{self.key}]" if self.label else self.key


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardState:
    """What is known of a shard from its files."""

    name: str
    status: Literal["done", "failed", "unfinished"] = "unfinished"
    """`failed`: every try it was granted has failed."""
    failures: int = 0
    detail: str = ""
    """How its last try ended and that one's last lines."""
    is_running: bool = False
    seconds: float = 0.0
    """Of the try that did it."""


@dataclass(frozen=True, slots=True)
class ShardFolder:
    """The files of one shard."""

    path: Path

    @property
    def output(self) -> Path:
        return self.path / "output"

    @property
    def done_file(self) -> Path:
        return self.path / "done.json"

    @property
    def failures_file(self) -> Path:
        return self.path / "failures.jsonl"

    @property
    def running_file(self) -> Path:
        """Locked by the process of a try."""
        return self.path / "running"

    @property
    def waits_file(self) -> Path:
        return self.path / "waits.json"

    def create(self, shard: Shard[Any], *, afresh: bool = True) -> None:
        """Make the directory (mode 0700); `afresh` forgets the failures of earlier submissions."""
        root = self.path.parents[1]
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in (root / "shards", self.path, self.output):
            directory.mkdir(mode=0o700, exist_ok=True)
        if not afresh and (self.path / "shard.json").exists():
            return
        self.failures_file.unlink(missing_ok=True)
        self.waits_file.unlink(missing_ok=True)
        values = {
            "entry": shard.entry,
            "arguments": shard.arguments.model_dump(mode="json"),
            "name": shard.name,
            "environment": dict(shard.environment),
        }
        # Not flushed to the disk, which can take seconds: it is written anew by every submission.
        write_atomic(self.path / "shard.json", json.dumps(values), sync=False)

    def read(self) -> dict[str, Any]:
        """What `create` wrote."""
        values: dict[str, Any] = json.loads((self.path / "shard.json").read_text())
        return values

    def wait_for(self, jobs: Sequence[str]) -> None:
        """Note that it is to be run again once these jobs have ended."""
        rounds = self.waits()[1] + 1
        write_atomic(self.waits_file, json.dumps({"jobs": list(jobs), "rounds": rounds}))

    def waits(self) -> tuple[list[str], int]:
        """The jobs for whose end it waits, and how often it has waited since it was submitted."""
        values = read_json(self.waits_file) or {"jobs": [], "rounds": 0}
        return values["jobs"], values["rounds"]

    def failures(self) -> list[dict[str, Any]]:
        return read_json_lines(self.failures_file)

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

    def state(self, tries: int) -> ShardState:
        failures = self.failures()
        values: dict[str, Any] = {"failures": len(failures)}
        if (done := read_json(self.done_file)) is not None:
            values |= {"status": "done", "seconds": done.get("seconds", 0.0)}
        elif failures:
            last = failures[-1]
            log = self.path / last["log"]
            values["detail"] = f"{last['what']}; the last lines of {log}:\n{last['detail']}"
            values["status"] = "failed" if len(failures) >= tries else "unfinished"
        known = read_json(self.path / "shard.json") or {"name": self.path.name}
        return ShardState(name=known["name"], is_running=self.is_running(), **values)

    def is_running(self) -> bool:
        if not self.running_file.exists():
            return False
        with self.running_file.open("r+") as stream:
            return not try_lock(stream.fileno())


def run_shard(path: Path) -> None:
    """One try: call the shard's function; `done.json` says that it returned."""
    folder = ShardFolder(path)
    if folder.done_file.exists():
        return
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("megadistill").setLevel(logging.INFO)
    values = folder.read()
    function, kind = load_entry(values["entry"])
    arguments = kind.model_validate(values["arguments"])
    begun = time.time()
    with folder.running_file.open("w") as stream:
        try_lock(stream.fileno())
        function(folder.output, arguments)
    values = {"seconds": round(time.time() - begun, 3), "host": socket.gethostname()}
    write_atomic(folder.done_file, json.dumps(values))


def load_entry(
    entry: str,
) -> tuple[Callable[[Path, ShardArguments], object], type[ShardArguments]]:
    """The function a shard names, and the class of its arguments."""
    module, _, name = entry.partition(":")
    function = getattr(importlib.import_module(module), name)
    _, kind, *_ = typing.get_type_hints(function).values()
    return function, kind


@dataclass(slots=True, kw_only=True)
class Worker:
    """Works shards off on this machine: `slots` at a time, each with its tries."""

    slots: int
    tries: int
    gpus: int = 0
    """GPUs of one slot; 0 leaves CUDA_VISIBLE_DEVICES alone."""
    may_wait: bool = False
    """Whether a shard may end with `STOPPED` to wait for other jobs; whoever calls sees to that."""
    stop: StopRequest = field(default_factory=StopRequest)
    """When asked to, it ends the running tries and leaves."""
    _processes: Processes = field(default_factory=Processes)
    _running: dict[str, tuple[ShardFolder, int]] = field(default_factory=dict)
    """Name of the process -> its shard and its slot."""

    def work(self, folders: Sequence[ShardFolder]) -> None:
        """Until every shard is done or has failed `tries` times, or until asked to stop."""
        waiting = deque(folder for folder in folders if folder.has_work(self.tries))
        with ExitStack() as stack:
            for folder in waiting:
                lock_shard(stack, folder)
            try:
                while (waiting or self._running) and self.stop.reason is None:
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
        values = folder.read()
        name = values["name"]
        # Shards share cores: threads that spin while they wait would slow each other down.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUNBUFFERED": "1"}
        environment |= values["environment"]
        environment |= {OUTPUT: str(folder.output), MAY_WAIT: "1" if self.may_wait else ""}
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
        if self.may_wait and exited.code == STOPPED and (jobs := folder.waits()[0]):
            say(f"{exited.name}: goes on after job {', '.join(jobs)}")
            return []
        folder.add_failure(exited)
        left = self.tries - len(folder.failures())
        say(f"{exited.describe()}; {left} tries left; the last lines of {exited.log}:")
        say(exited.tail())
        return [folder] if left > 0 else []


def lock_shard(stack: ExitStack, folder: ShardFolder) -> None:
    """Hold the shard until the stack ends, so that nobody works on it at the same time."""
    busy = (
        f"{folder.path}: found another process at work on this shard, expected none; "
        "wait for it, or end it"
    )
    stack.enter_context(held_lock(folder.path / "lock", LOCK_WAIT_S, lambda: busy))


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
