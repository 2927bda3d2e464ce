"""Stop requests to a process of a job, and the exit codes by which it reports how it ended."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

DONE, FAILED, STOPPED = 0, 1, 75
"""Exit codes; 75 (EX_TEMPFAIL) says that the run can be resumed."""

STOP_SIGNALS = {
    signal.SIGUSR1: "SIGUSR1, Slurm's warning of the time limit or of preemption",
    signal.SIGTERM: "SIGTERM",
    signal.SIGHUP: "SIGHUP, the terminal is gone",
    signal.SIGINT: "Ctrl-C",
}


@dataclass(slots=True)
class StopRequest:
    """Whether this process was asked to stop."""

    reason: str | None = None
    """Why this process was first asked to stop."""


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note the signals that ask the run to stop; a second Ctrl-C interrupts at once."""
    request = StopRequest()

    def note(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and request.reason is not None:
            raise KeyboardInterrupt
        request.reason = request.reason or STOP_SIGNALS[signal.Signals(number)]

    # Under nohup SIGHUP is ignored, and stays so.
    handled = [
        n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN
    ]
    previous = {number: signal.signal(number, note) for number in handled}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
