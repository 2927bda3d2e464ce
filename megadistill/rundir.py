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

from megadistill.atomic import sync_tree, write_atomic
from megadistill.config import RunConfig, dump, first_day, load, parse, read_tree, resolve_path

WHOLE = "WHOLE"
"""Written last into a checkpoint, with size and CRC-32 of every file: without it, it is torn."""

MAY_CHANGE = (
    "data.accept_changes",
    *("cluster.", "log.", "checks.", "checkpoint.", "parallel.", "batch.micro_batch_tokens"),
    *(f"rollout.{key}" for key in ("engines", "tp", "placement", "threads", "max_num_seqs")),
    *(f"rollout.{key}" for key in ("memory_fraction", "kv_cache_gib", "timeout_s", "start_")),
)
"""Settings that a resumed run may change: where and how it computes, not what."""

READ_BYTES = 16 << 20


def read_object(file: Path) -> dict[str, Any]:
    """What a JSON file of a run holds; nothing where there is none. Raises `ValueError` naming it."""
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file}: damaged, found no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: damaged, found {str(found)[:40]!r}, expected a JSON object")
    return found


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one run. Creating it touches nothing; `create` and the writers do."""

    path: Path

    @classmethod
    def of(cls, config: RunConfig) -> "RunDir":
        return cls((Path(config.runs_dir) / config.name).absolute())

    def create(self, config: RunConfig) -> None:
        """Make the directories (mode 0700) and write the resolved configuration.

        Only whoever owns the run (`launch.heartbeats.sole_owner`) may call it. Settings of
        `MAY_CHANGE` may differ from those of an earlier attempt, and at a constant learning rate
        a run may get another number of steps that it has not reached yet, also when it was done
        with fewer; what changed is a line of `state/events.jsonl`. Raises `ValueError` when the
        directory belongs to a run with other settings.
        """
        self.make_directories()
        config = self._dated(config)
        text = dump(config)
        changed: dict[str, str] = {}
        if self.config_file.exists():
            changed = changed_settings(dump(self.load_config()), text)
            if named := self._not_allowed(changed, config):
                raise ValueError(
                    f"{self.path} holds a run with other settings ({', '.join(named[:5])}); "
                    "change `name` to start a new run, or delete that directory"
                )
        if "steps" in changed and self.read_progress().get("done"):
            self._take_up_again(config)
        if changed:
            self.note_event("settings changed", changed)
        if changed or not self.config_file.exists():
            write_atomic(self.config_file, text)

    def make_directories(self) -> None:
        """The run's directories, for nobody else's eyes."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("control", "state", "checkpoints", "rollouts", "weights", "logs", "report"):
            (self.path / name).mkdir(mode=0o700, exist_ok=True)

    def load_config(self) -> RunConfig:
        return load(RunConfig, self.config_file)

    def look_at_config(self) -> RunConfig:
        """For those who only look at a run: without keys that another version has written."""
        tree = read_tree(self.config_file)
        return parse(RunConfig, tree, str(self.config_file), unknown="ignore")

    def has_done(self, config: RunConfig) -> bool:
        """Whether the run is done and `config` asks nothing more of it."""
        if not (self.read_progress().get("done") and self.config_file.exists()):
            return False
        changed = changed_settings(dump(self.load_config()), dump(self._dated(config)))
        return "steps" not in changed and not self._not_allowed(changed, config)

    def note_event(self, what: str, details: Mapping[str, Any]) -> None:
        """A line in `state/events.jsonl`, for people."""
        line = {"time": time.time(), "what": what, **details}
        with (self.path / "state" / "events.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def _dated(self, config: RunConfig) -> RunConfig:
        """The configuration with the day on which the run began, where it names none."""
        date = config.data.date or first_day(self.config_file, "data", "date")
        return config.model_copy(update={"data": config.data.model_copy(update={"date": date})})

    def _not_allowed(self, changed: Mapping[str, str], config: RunConfig) -> list[str]:
        """The changes, as `key: old -> new`, that a run cannot take in the middle."""
        named = [f"{k}: {change}" for k, change in changed.items() if not k.startswith(MAY_CHANGE)]
        if "steps" not in changed:
            return named
        reached = self.read_progress().get("step", 0)
        if config.optimizer.decay == "constant" and config.steps > reached:
            named.remove(f"steps: {changed['steps']}")
        return named

    def _take_up_again(self, config: RunConfig) -> None:
        """Make a finished run one that has steps to go; its student stays as that of a step."""
        progress = self.read_progress()
        named = config.checkpoint.export_dir
        export = Path(resolve_path(named)).absolute() if named else self.export
        kept = self.step_export(progress["step"])
        if export.exists() and not kept.exists():
            self.exports.mkdir(mode=0o700, exist_ok=True)
            shutil.move(export, kept)
        self.write_progress(progress | {"steps": config.steps, "done": False})

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
        attempt = self.num_attempts
        write_atomic(self._attempt_counter, json.dumps({"attempts": attempt + 1}))
        return attempt

    @property
    def num_attempts(self) -> int:
        """Attempts that have begun."""
        counter = self._attempt_counter
        return int(json.loads(counter.read_text())["attempts"]) if counter.exists() else 0

    @property
    def _attempt_counter(self) -> Path:
        return self.path / "state" / "attempts.json"

    def request_stop(self, reason: str) -> None:
        write_atomic(self.stop_file, reason)

    def write_progress(self, values: Mapping[str, Any]) -> None:
        write_atomic(self.progress_file, json.dumps({**values, "updated": time.time()}))

    def read_progress(self) -> dict[str, Any]:
        """The last progress; empty before the first step."""
        return read_object(self.progress_file)

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[Path]:
        """The directories of all checkpoints, whole or torn, newest first."""
        found = (self.path / "checkpoints").glob("step-*")
        return sorted(found, key=step_of, reverse=True)

    def whole_checkpoints(self) -> list[tuple[int, Path]]:
        """(step, directory) of every checkpoint with all of its files, oldest first."""
        return [(step_of(path), path) for path in self.checkpoints()[::-1] if is_whole(path)]

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
            if directory not in kept and step_of(directory) <= newest:
                shutil.rmtree(directory)


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


def was_whole(directory: Path) -> bool:
    """Whether a checkpoint was finished once, whatever has become of its files."""
    return (directory / WHOLE).exists()


def damaged_files(directory: Path) -> list[str]:
    """Files of a whole checkpoint whose content is not what was written; reads all of it."""
    expected: dict[str, str] = json.loads((directory / WHOLE).read_text())["crc32"]
    found = hash_files(directory, expected)
    return [name for name, value in expected.items() if found[name] != value]


def changed_settings(old_text: str, new_text: str) -> dict[str, str]:
    """Key path -> `old -> new` of what differs between two dumped configurations."""
    return changed_values(_leaves(yaml.safe_load(old_text)), _leaves(yaml.safe_load(new_text)))


def changed_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Key -> `old -> new` of what differs, whatever the values are."""
    return {
        key: f"{old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in {**old, **new}
        if key not in old or key not in new or old[key] != new[key]
    }


def step_of(checkpoint: Path) -> int:
    """The number of steps after which a checkpoint was written."""
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
