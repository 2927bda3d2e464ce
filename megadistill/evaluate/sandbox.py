"""Runs programs that models wrote: Linux namespaces without network, a root that cannot be written,
and limits of time, memory, processes and files.

Inside there are the system's libraries, the Python installation and an empty /box that lives in
memory; no home, no /proc, no other process. It needs no root, but either root or user namespaces.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

Mode = Literal["namespaces", "none"]
INNER = Path(__file__).with_name("sandbox_inner.py")
SETUP_S = 10.0
"""Seconds that making the sandbox may take, beyond the program's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may take."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_mib: int = 2048
    """Address space of each process."""
    processes: int = 16
    file_mib: int = 16
    """Size of one file, its output among them."""
    disk_mib: int = 64
    """All files together; they lie in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended."""

    code: int
    """Exit status; negative: the signal that ended it."""
    stdout: str
    stderr: str
    timed_out: bool
    seconds: float


def run_python(
    program: str,
    stdin: str = "",
    limits: Limits | None = None,
    *,
    mode: Mode = "namespaces",
    readable: Sequence[Path] = (),
) -> Outcome:
    """Run a Python program; `readable` are directories it may read besides the system's.

    Raises `ValueError` where there is no sandbox and `mode` does not say to go without.
    """
    if mode == "namespaces" and (problem := missing()):
        raise ValueError(problem)
    return _run(program, stdin, limits or Limits(), mode, readable)


@functools.cache
def missing() -> str | None:
    """Why no sandbox can be made here, and what to do; None where one can."""
    if sys.platform != "linux":
        reason = "it needs Linux"
    else:
        found = _run("print(6 * 7)", "", Limits(), "namespaces", ())
        if found.stdout == "42\n":
            return None
        reason = found.stderr.strip() or f"a trial ended with {found.code}"
    return (
        f"no sandbox for programs can be made here: {reason}. Allow unprivileged user namespaces "
        "(sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces) or run as root; "
        "mode `none` runs such programs with your own rights, which is dangerous"
    )


def _run(program: str, stdin: str, limits: Limits, mode: Mode, readable: Sequence[Path]) -> Outcome:
    python = str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
    roots = [str(path) for path in (Path(sys.base_prefix), *readable)]
    spec = {"python": python, "mode": mode, "readable": roots, "limits": asdict(limits)}
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        spec |= {"folder": folder, "program": program}
        given.write(stdin.encode())
        given.seek(0)
        process = subprocess.Popen(
            [python, "-I", "-S", str(INNER), str(_spec_file(folder, spec))],
            stdin=given,
            stdout=out,
            stderr=err,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            cwd="/",
            start_new_session=True,
        )
        begun = time.monotonic()
        allowed = limits.wall_s + (SETUP_S if mode == "namespaces" else 0)
        try:
            code = process.wait(allowed)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        seconds = time.monotonic() - begun
        timed_out |= code in (-signal.SIGXCPU, 128 + signal.SIGXCPU)
        most = limits.file_mib << 20
        return Outcome(
            code=code,
            stdout=_read(out, most),
            stderr=_read(err, most),
            timed_out=timed_out,
            seconds=seconds,
        )


def _spec_file(folder: str, spec: object) -> Path:
    file = Path(folder) / "spec.json"
    file.write_text(json.dumps(spec))
    return file


def _read(stream: IO[bytes], most: int) -> str:
    stream.seek(0)
    return stream.read(most).decode("utf-8", "replace")
