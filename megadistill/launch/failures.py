"""Failed attempts that are worth another, and those that are not: the same error at the same step.

state/failures.jsonl    a line for every failed attempt of the run: attempt, step, error
"""

import json
import re
from dataclasses import asdict, dataclass

from megadistill.launch.heartbeats import NO_SPACE, Failure
from megadistill.metrics import read_json_lines
from megadistill.rundir import RunDir

FAILURES = "failures.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class PastFailure:
    """What is kept of a failed attempt."""

    attempt: int
    step: int
    """Steps the run had taken."""
    error: str
    """The culprit and its last line, without what differs each time."""


def note_failure(run: RunDir, attempt: int, failure: Failure) -> PastFailure | None:
    """Keep a failed attempt; the one before it when that was the same error at the same step."""
    now = PastFailure(
        attempt=attempt, step=run.read_progress().get("step", 0), error=error_text(failure)
    )
    past = read_failures(run)
    try:
        with (run.path / "state" / FAILURES).open("a") as stream:
            stream.write(json.dumps(asdict(now)) + "\n")
    except OSError as error:
        if error.errno not in NO_SPACE:  # then only cluster.max_attempts bounds the attempts
            raise
    if past and (past[-1].step, past[-1].error) == (now.step, now.error):
        return past[-1]
    return None


def read_failures(run: RunDir) -> list[PastFailure]:
    """The failed attempts of a run, oldest first."""
    return [PastFailure(**row) for row in read_json_lines(run.path / "state" / FAILURES)]


def error_text(failure: Failure) -> str:
    """What two failures of one kind have in common: no numbers, no place."""
    what, _, _ = failure.what.partition(" on node ")
    last = [line for line in failure.detail.splitlines() if line.strip()][-1:]
    return re.sub(r"0x[0-9a-f]+|\d+", "#", " | ".join([what, *last]))
