"""How the attempts of a run ended: a line for each in state/attempts.jsonl.

A failed attempt has its line when it ends: the same error at the same step is not worth another. The
others have theirs when the next begins.
"""

import json
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megadistill.launch.heartbeats import NO_SPACE, Failure, Heartbeats, attempt_directory
from megadistill.launch.shared_files import as_kind, read_json
from megadistill.metrics import read_json_lines
from megadistill.rundir import RunDir

LOST = "it was requeued, or its job was lost"
KEPT_S = 3600.0
"""For so long the files by which the nodes of an attempt met are kept: one may still read them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of the run's processes, and how it ended."""

    attempt: int
    status: str
    """`done`, `stopped`, `failed`, `under way`, or `interrupted`: it left no outcome."""
    message: str
    step: int | None = None
    """Steps the run had taken when it ended."""
    error: str = ""
    """Of a failed one the culprit and its last line, without what differs each time."""
    detail: str = ""
    """The culprit's last lines."""


def note_failure(run: RunDir, attempt: int, failure: Failure) -> Attempt | None:
    """Keep a failed attempt; the one before it when that was the same error at the same step."""
    past = [one for one in read_ended(run).values() if one.error]
    now = Attempt(
        attempt=attempt,
        status="failed",
        message=failure.what,
        step=run.read_progress().get("step", 0),
        error=error_text(failure),
        detail=failure.detail,
    )
    try:
        _append(run, now)
    except OSError as error:
        if error.errno not in NO_SPACE:  # then only cluster.max_attempts bounds the attempts
            raise
    if past and (past[-1].step, past[-1].error) == (now.step, now.error):
        return past[-1]
    return None


def close_attempts(run: RunDir, attempt: int) -> None:
    """Note how the attempts before this one ended, and delete the files of old ones."""
    ended = read_ended(run)
    for number in attempt_numbers(run):
        directory = attempt_directory(run, number)
        if number not in ended:
            _append(run, left_by(run, number))
        newest = max(file.stat().st_mtime for file in [directory, *directory.iterdir()])
        if number < attempt - 1 and time.time() - newest > KEPT_S:
            shutil.rmtree(directory)


def read_ended(run: RunDir) -> dict[int, Attempt]:
    """Attempt -> how it ended, of those that are noted."""
    rows = read_json_lines(_file(run))
    return {row["attempt"]: as_kind(Attempt, row) for row in rows}


def attempt_numbers(run: RunDir) -> list[int]:
    """Of those whose nodes' files are there still."""
    found = (run.path / "control").glob("attempt-*")
    return sorted(int(directory.name.removeprefix("attempt-")) for directory in found)


def error_text(failure: Failure) -> str:
    """What two failures of one kind have in common: no numbers, no place."""
    what, _, _ = failure.what.partition(" on node ")
    last = [line for line in failure.detail.splitlines() if line.strip()][-1:]
    return re.sub(r"0x[0-9a-f]+|\d+", "#", " | ".join([what, *last]))


def left_by(run: RunDir, attempt: int) -> Attempt:
    """How an attempt ended: by node 0's outcome, or as one that left none."""
    directory = attempt_directory(run, attempt)
    end = Heartbeats(directory=directory, node=0).read_outcome()
    last = [read_json(file) for file in sorted(directory.glob("node-*.json"))]
    reasons = [str(beat["stop"]) for beat in last if beat and beat["stop"]]
    return Attempt(
        attempt=attempt,
        status=end.status if end else "interrupted",
        message=end.message if end else [*reasons, LOST][0],
        step=run.read_progress().get("step", 0),
        detail=end.failure.detail if end and end.failure else "",
    )


def _append(run: RunDir, ended: Attempt) -> None:
    with _file(run).open("a") as stream:
        stream.write(json.dumps(asdict(ended)) + "\n")


def _file(run: RunDir) -> Path:
    return run.path / "state" / "attempts.jsonl"
