"""The run directory: the bus on which the processes of a run meet, and what a resume reads.

config.yaml        the resolved configuration, itself a valid input
control/           token, engine addresses, stop request; renewed by every attempt
state/             progress.json (for people and for the launcher)
checkpoints/       step-000010/ ..., each whole or absent
rollouts/          step-000010.parquet ..., every rollout with its scores
weights/           what the trainer publishes to the engines
metrics.jsonl      one line a step
logs/  report/  export/
exports/           step-000010/ ..., students in Hugging Face format before the last
evaluations/       step-000010/ ..., final/: the work that an export has started
"""

import json
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megadistill.config import RunConfig, dump_config, load_config

WHOLE = "WHOLE"
"""Written last into a checkpoint, with size and CRC-32 of every file: without it, it is torn."""

HARMLESS = ("cluster.", "log.", "checks.", "checkpoint.", "rollout.timeout_s", "rollout.start_")
"""Settings that a resumed run may change: they do not touch what it computes."""

READ_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one run. Creating it touches nothing; `create` and the writers do."""

    path: Path

    @classmethod
    def of(cls, config: RunConfig) -> "RunDir":
        return cls((Path(config.runs_dir) / config.name).absolute())

    def create(self, config: RunConfig) -> None:
        """Make the directories (mode 0700) and write the resolved configuration.

        Raises `ValueError` when the directory belongs to a run with other settings; `HARMLESS`
        ones may differ, and a run that is not done may get more steps at a constant rate.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("control", "state", "checkpoints", "rollouts", "weights", "logs", "report"):
            (self.path / name).mkdir(mode=0o700, exist_ok=True)
        text = dump_config(config)
        if self.config_file.exists():
            changed = changed_settings(dump_config(self.load_config()), text)
            if config.optimizer.decay == "constant" and self._may_go_on(config.steps):
                changed.pop("steps", None)
            named = [
                f"{key}: {change}"
                for key, change in changed.items()
                if not key.startswith(HARMLESS)
            ]
            if named:
                raise ValueError(
                    f"{self.path} holds a run with other settings ({', '.join(named[:5])}); "
                    "change `name` to start a new run, or delete that directory"
                )
        write_atomic(self.config_file, text)

    def load_config(self) -> RunConfig:
        return load_config(self.config_file)

    def _may_go_on(self, steps: int) -> bool:
        """Whether the run, by what it has done so far, can still end after this many steps."""
        progress = self.read_progress()
        return not progress.get("done") and steps > progress.get("step", 0)

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def progress_file(self) -> Path:
        """JSON: step, steps, done, phase, updated (seconds since the epoch), message."""
        return self.path / "state" / "progress.json"

    @property
    def stop_file(self) -> Path:
        """Exists when somebody asked the run to save at the next edge and end."""
        return self.path / "control" / "stop"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def exports(self) -> Path:
        """Holds the students exported before the last, `step_export(step)`."""
        return self.path / "exports"

    def step_export(self, step: int) -> Path:
        return self.exports / f"step-{step:06d}"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def log_file(self, role: str, attempt: int) -> Path:
        return self.path / "logs" / f"{role}.{attempt}.log"

    def engine_file(self, index: int) -> Path:
        """JSON with the address of engine `index`, written by the engine once it listens."""
        return self.path / "control" / f"engine-{index}.json"

    def rollout_file(self, step: int) -> Path:
        """The rollouts that made optimizer step number `step`, counted from 1."""
        return self.path / "rollouts" / f"step-{step:06d}.parquet"

    def token(self) -> str:
        """The run's secret, made on first use; engines refuse requests without it."""
        file = self.path / "control" / "token"
        try:
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return file.read_text()
        with os.fdopen(handle, "w") as stream:
            stream.write(token := secrets.token_urlsafe(32))
        return token

    def begin_attempt(self) -> int:
        """Clear what the last attempt left in `control/` and count this one, from 0."""
        for file in (self.path / "control").glob("engine-*.json"):
            file.unlink()
        self.stop_file.unlink(missing_ok=True)
        (self.path / "control" / "token").unlink(missing_ok=True)
        self.token()
        counter = self.path / "state" / "attempts.json"
        attempt = json.loads(counter.read_text())["attempts"] if counter.exists() else 0
        write_atomic(counter, json.dumps({"attempts": attempt + 1}))
        return attempt

    def request_stop(self, reason: str) -> None:
        write_atomic(self.stop_file, reason)

    def write_progress(self, values: Mapping[str, Any]) -> None:
        write_atomic(self.progress_file, json.dumps({**values, "updated": time.time()}))

    def read_progress(self) -> dict[str, Any]:
        """The last progress; empty before the first step."""
        if not self.progress_file.exists():
            return {}
        progress: dict[str, Any] = json.loads(self.progress_file.read_text())
        return progress

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[Path]:
        """The directories of all checkpoints, whole or torn, newest first."""
        found = (self.path / "checkpoints").glob("step-*")
        return sorted(found, key=_step_of, reverse=True)

    def whole_checkpoints(self) -> list[tuple[int, Path]]:
        """(step, directory) of every checkpoint with all of its files, oldest first."""
        return [(_step_of(path), path) for path in self.checkpoints()[::-1] if is_whole(path)]

    @contextmanager
    def writing_checkpoint(self, step: int) -> Iterator[Path]:
        """Rank 0 only: a fresh directory that becomes whole when the block ends well."""
        directory = self.checkpoint(step)
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir(mode=0o700, parents=True)
        yield directory
        sizes = sync_tree(directory)
        marks = {"sizes": sizes, "crc32": hash_files(directory, sizes)}
        write_atomic(directory / WHOLE, json.dumps(marks))

    def drop_old_checkpoints(self, keep: int) -> None:
        """Delete all but the newest `keep` whole checkpoints, and torn ones older than those."""
        whole = self.whole_checkpoints()
        kept = {directory for _, directory in whole[-keep:]}
        newest = whole[-1][0] if whole else -1
        for directory in self.checkpoints():
            if directory not in kept and _step_of(directory) <= newest:
                shutil.rmtree(directory)


def write_atomic(file: Path, text: str) -> None:
    """Write so that a reader sees the old content or the new, never a part; survives a crash."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def sync_tree(directory: Path) -> dict[str, int]:
    """Flush every file below `directory` to disk; relative name -> size in bytes."""
    sizes: dict[str, int] = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
            sizes[str(file.relative_to(directory))] = file.stat().st_size
    return sizes


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Name -> CRC-32 of each file's content; several at once, for they are read through."""

    def crc32(name: str) -> str:
        value = 0
        with (directory / name).open("rb") as stream:
            while block := stream.read(READ_BYTES):
                value = zlib.crc32(block, value)
        return f"{value:08x}"

    names = list(names)
    with ThreadPoolExecutor(8) as threads:
        return dict(zip(names, threads.map(crc32, names), strict=True))


def is_whole(directory: Path) -> bool:
    """Whether a checkpoint was finished and none of its files has been lost or cut since."""
    try:
        sizes: dict[str, int] = json.loads((directory / WHOLE).read_text())["sizes"]
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, ValueError, KeyError):  # no marker, or not one that we wrote
        return False


def damaged_files(directory: Path) -> list[str]:
    """Files of a whole checkpoint whose content is not what was written; reads all of it."""
    expected: dict[str, str] = json.loads((directory / WHOLE).read_text())["crc32"]
    found = hash_files(directory, expected)
    return [name for name, value in expected.items() if found[name] != value]


def changed_settings(old_text: str, new_text: str) -> dict[str, str]:
    """Key path -> `old -> new` of what differs between two dumped configurations."""
    old, new = _leaves(yaml.safe_load(old_text)), _leaves(yaml.safe_load(new_text))
    return {
        key: f"{old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in {**old, **new}
        if key not in old or key not in new or old[key] != new[key]
    }


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of everything in a configuration that is not itself a mapping."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
