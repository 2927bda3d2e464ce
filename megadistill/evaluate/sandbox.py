"""Runs programs that models wrote: in bubblewrap without network, on a root that cannot be written,
under limits of time, memory, processes and files.

Inside there are the system's libraries, the Python installation and an empty /box that lives in
memory, shared memory in it; no home, no /proc, no other process. As root the program becomes a user
that nobody is; any other user needs user namespaces.
"""

import errno
import functools
import os
import platform
import re
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import psutil

Mode = Literal["bubblewrap", "none"]
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
PATIENCE_S = 5.0
"""Seconds that a killed program may take to be gone."""
FILES = 4096
"""In /box; each takes a kilobyte of the kernel's memory."""
OWN_COUNTS = (5, 14)
"""From this Linux on a user namespace counts its own processes only."""


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
    """All files and shared memory together; they lie in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended."""

    code: int
    """Exit status; negative, or above 128: the signal that ended it."""
    stdout: str
    stderr: str
    timed_out: bool
    seconds: float


def run_python(
    program: str,
    stdin: str = "",
    limits: Limits | None = None,
    *,
    mode: Mode = "bubblewrap",
    readable: Sequence[Path] = (),
) -> Outcome:
    """Run a Python program; `readable` are directories it may read besides the system's.

    Raises `ValueError` where there is no sandbox and `mode` does not say to go without.
    """
    if mode == "bubblewrap" and (problem := missing()):
        raise ValueError(problem)
    return _run(program, stdin, limits or Limits(), mode, readable)


@functools.cache
def missing() -> str | None:
    """Why no sandbox can be made here, and what to do; None where one can."""
    remedy = "`sandbox: none` runs such programs with your own rights, which is dangerous"
    if shutil.which("bwrap") is None:
        return f"found no `bwrap`, which confines programs: install bubblewrap; {remedy}"
    trial = "import os\nif os.fork() == 0:\n    os._exit(0)\nos.wait()\nprint(6 * 7)"
    found = _run(trial, "", Limits(), "bubblewrap", ())
    if found.stdout == "42\n":
        return None
    reason = found.stderr.strip() or f"a trial ended with {found.code}"
    return (
        f"bubblewrap cannot confine programs here: {reason}. Allow unprivileged user namespaces "
        f"(sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces), or run as root; {remedy}"
    )


def _run(program: str, stdin: str, limits: Limits, mode: Mode, readable: Sequence[Path]) -> Outcome:
    python = str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
    confined = mode == "bubblewrap"
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        given, source, rules = (
            stack.enter_context(_filled(content))
            for content in (
                stdin.encode(),
                program.encode(),
                forbidden_calls() if confined else b"",
            )
        )
        out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        if confined:
            roots = [Path(sys.base_prefix), *readable]
            command = bubblewrap(limits, roots, source.fileno(), rules.fileno())
            command += [*limited(limits, process_limit(limits.processes)), python]
        else:
            Path(folder, "program.py").write_text(program)
            command = [*limited(limits, None), python]
        begun = time.monotonic()
        process = subprocess.Popen(
            [*command, "-I", "/box/program.py" if confined else "program.py"],
            stdin=given,
            stdout=out,
            stderr=err,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/box", "TMPDIR": "/box"},
            cwd=folder,
            pass_fds=(source.fileno(), rules.fileno()),
            start_new_session=True,
        )
        try:
            code = process.wait(limits.wall_s)
            timed_out = code in (-signal.SIGXCPU, 128 + signal.SIGXCPU)
        except subprocess.TimeoutExpired:
            code, timed_out = _kill(process, confined=confined), True
        return Outcome(
            code=code,
            stdout=_read(out, limits.file_mib << 20),
            stderr=_read(err, limits.file_mib << 20),
            timed_out=timed_out,
            seconds=time.monotonic() - begun,
        )


def bubblewrap(limits: Limits, readable: Iterable[Path], source: int, rules: int) -> list[str]:
    """What a program's command follows: the box, with the program that descriptor `source` holds."""
    words = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session"]
    words += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    words += ["--hostname", "sandbox"]
    rights = ["setpriv", "--inh-caps=-all", "--ambient-caps=-all"]
    if os.geteuid() == 0:
        user = unused_user()
        rights += [f"--reuid={user}", f"--regid={user}", "--clear-groups", "--bounding-set=-all"]
    else:  # the right to mount is for /box, and given up before the program
        words += ["--unshare-user", "--uid", "1", "--gid", "1", "--cap-add", "CAP_SYS_ADMIN"]
    shown = dict.fromkeys([*SYSTEM, *map(str, readable)], "--ro-bind-try")
    for path, binding in (shown | dict.fromkeys(DEVICES, "--dev-bind")).items():
        for above in [*Path(path).parents][-2::-1]:  # else only their maker could pass through them
            words += ["--perms", "0755", "--dir", str(above)]
        words += [binding, path, path]
    words += ["--perms", "1777", "--tmpfs", "/box", "--chdir", "/box"]
    words += ["--symlink", "/box", "/dev/shm"]
    if not any(Path(path).is_relative_to("/tmp") for path in shown):  # as an environment there is
        words += ["--symlink", "/box", "/tmp"]
    words += ["--file", str(source), "/box/program.py", "--remount-ro", "/"]
    words += ["--seccomp", str(rules)]
    sizes = f"remount,nosuid,nodev,size={limits.disk_mib}m,nr_inodes={FILES}"
    box = f'mount -i -n -t tmpfs -o {sizes} tmpfs /box && exec "$@"'
    return [*words, "/bin/sh", "-c", box, "sh", *rights]


def unused_user() -> int:
    """A number that no other user has, nor another program: a user's processes are counted together."""
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    half = min(max(int(first) + int(count) for first, _, count in ranges), 1 << 31) // 2
    return half + secrets.randbelow(half - 1)


def limited(limits: Limits, processes: int | None) -> list[str]:
    """The `prlimit` that a command follows."""
    sizes = {
        # Out of CPU time a process gets a signal of its own, and a second later is killed.
        "cpu": f"{limits.cpu_s}:{limits.cpu_s + 1}",
        "as": limits.memory_mib << 20,
        "fsize": limits.file_mib << 20,
        "nofile": 256,
        "core": 0,
    }
    if processes is not None:
        sizes["nproc"] = processes
    return ["prlimit", *(f"--{name}={value}" for name, value in sizes.items())]


def process_limit(most: int, release: str = platform.release()) -> int:
    """The limit that leaves `most` processes where those outside of the box count too."""
    version = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    if version >= OWN_COUNTS or os.geteuid() == 0:
        return most
    own = (p for p in psutil.process_iter(["uids", "num_threads"]) if p.info["uids"])
    return most + sum(p.info["num_threads"] or 0 for p in own if p.info["uids"].real == os.getuid())


FORBIDDEN = {
    # Memory that no limit counts.
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    # Namespaces of its own.
    "unshare": (272, 97),
    "setns": (308, 268),
    # The memory and the descriptors of another process: of a driver that tests it.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    # Large parts of the kernel that no program of ours needs.
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
}
"""System calls that a confined program cannot make, by their numbers on x86-64 and on ARM."""
CLONE = (56, 220)
CLONE3 = 435
NEW_NAMESPACES = 0x7E020000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000
"""From here on the numbers are of another set of calls for the same processor."""


def forbidden_calls(machine: str = platform.machine()) -> bytes:
    """The filter of system calls, in the kernel's classic BPF (linux/filter.h, linux/seccomp.h)."""
    if machine not in ARCHITECTURES:
        raise ValueError(f"sandbox: found a processor {machine}, expected {list(ARCHITECTURES)}")
    column = list(ARCHITECTURES).index(machine)
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    refuse, allow = 0x00050000 | errno.EPERM, 0x7FFF0000
    rules = [(load, 0, 0, 4), (equal, 1, 0, ARCHITECTURES[machine]), (give, 0, 0, refuse)]
    rules += [(load, 0, 0, 0), (at_least, 0, 1, X32), (give, 0, 0, refuse)]
    for numbers in FORBIDDEN.values():
        rules += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    # Its flags lie where no filter can see them: without it, libraries take `clone`.
    rules += [(equal, 0, 1, CLONE3), (give, 0, 0, 0x00050000 | errno.ENOSYS)]
    rules += [(equal, 0, 3, CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, NEW_NAMESPACES)]
    rules += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *rule) for rule in rules)


def _kill(process: subprocess.Popen[bytes], *, confined: bool) -> int:
    """End a program and all that it has started; returns its exit status when they are gone."""
    if confined:
        # Without process 1 of the box the kernel ends the others, and bubblewrap waits for that.
        for child in psutil.Process(process.pid).children():
            child.kill()
        with suppress(subprocess.TimeoutExpired):
            return process.wait(PATIENCE_S)
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _filled(content: bytes) -> IO[bytes]:
    """A file without a name, to be read from its beginning."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    file.write(content)
    file.seek(0)
    return file


def _read(stream: IO[bytes], most: int) -> str:
    stream.seek(0)
    return stream.read(most).decode("utf-8", "replace")
