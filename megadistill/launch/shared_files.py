"""Locks and JSON files by which processes on several hosts know of each other."""

import errno
import fcntl
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

POLL_S = 0.1
Kind = TypeVar("Kind")


@contextmanager
def held_lock(file: Path, wait_s: float, busy: Callable[[], str]) -> Iterator[None]:
    """Hold the lock of a file; the kernel drops it with the process.

    Raises `ValueError` with what `busy` says when somebody else has it for `wait_s` seconds.
    """
    with file.open("w") as lock:
        deadline = time.monotonic() + wait_s
        while not try_lock(lock.fileno()):
            if time.monotonic() > deadline:
                raise ValueError(busy())
            time.sleep(POLL_S)
        yield


def try_lock(handle: int) -> bool:
    """False when somebody else has the lock; True also where the file system knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


def read_json(file: Path) -> dict[str, Any] | None:
    """The file's values (any: it is JSON), or None while it is not there."""
    try:
        with file.open("rb") as stream:
            values: dict[str, Any] = json.loads(stream.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ESTALE:  # replaced on another host while we opened it
            raise
        return None
    return values


def read_as(kind: type[Kind], file: Path) -> Kind | None:
    """What the file holds, or None while it is not there."""
    values = read_json(file)
    return None if values is None else as_kind(kind, values)


def as_kind(kind: type[Kind], values: dict[str, Any]) -> Kind:
    """A dataclass from JSON (any); what another version has written besides is left out."""
    made: Kind = _adapter(kind).validate_python(values)
    return made


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
"""Made once for a kind, which takes milliseconds."""
