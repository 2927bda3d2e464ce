"""The inside of the sandbox: a script of the standard library alone, run by `sandbox`.

    python -I -S sandbox_inner.py SPEC

The first process makes the namespaces and waits; its child is process 1 inside, builds the root and
waits for its own child, which gives up every right, takes its limits and becomes the program. When
process 1 ends, by itself or because the first process is killed, the kernel ends all the others.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

SETUP_FAILED = 125
NOBODY = 65534
NEWNS, NEWUTS, NEWIPC, NEWUSER = 0x00020000, 0x04000000, 0x08000000, 0x10000000
NEWPID, NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
LAST_CAPABILITY = 63
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("null", "zero", "random", "urandom")
LIBC = ctypes.CDLL(None, use_errno=True)


def main(spec: dict[str, Any]) -> int:
    """Run the program of `spec` (any: JSON) and return its exit status."""
    if spec["mode"] == "none":
        Path(spec["folder"], "program.py").write_text(spec["program"])
        os.chdir(spec["folder"])
        become_program(spec, "program.py", drop=False)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    as_root = os.geteuid() == 0
    if not as_root:
        own_user_namespace()
    call("unshare", NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS)
    child = os.fork()
    if child == 0:
        first_process(spec, as_root)
    return wait_for(child)


def own_user_namespace() -> None:
    """Become root of a user namespace in which nobody else exists."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def first_process(spec: dict[str, Any], as_root: bool) -> None:
    """Process 1: build the root, start the program, end when it or its time ends."""
    try:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        build_root(spec)
        socket.sethostname("sandbox")
        child = os.fork()
    except OSError as error:
        fail(error)
    if child == 0:
        try:
            drop_rights(as_root)
            become_program(spec, "/box/program.py", drop=True)
        except OSError as error:
            fail(error)
    deadline = time.monotonic() + spec["limits"]["wall_s"]
    while time.monotonic() < deadline:
        ended, status = os.waitpid(-1, os.WNOHANG)  # orphans are inherited by process 1
        if ended == child:
            os._exit(exit_code(status))
        if ended == 0:
            time.sleep(0.005)
    os._exit(128 + signal.SIGXCPU)  # the kernel ends all the others


def build_root(spec: dict[str, Any]) -> None:
    """A small tree in memory with what may be read, made this process's root."""
    limits = spec["limits"]
    root = Path(spec["folder"]) / "root"
    root.mkdir()
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for name in dict.fromkeys((*SYSTEM, *spec["readable"])):
        show(Path(name), root)
    (root / "dev").mkdir()
    for device in DEVICES:
        target = root / "dev" / device
        target.touch()
        mount(f"/dev/{device}", target, None, MS_BIND)
    for name, size in (("box", limits["disk_mib"]), ("tmp", 1)):
        (root / name).mkdir(exist_ok=True)
        options = f"size={size}m,nr_inodes=4096,mode=777"
        mount("tmpfs", root / name, "tmpfs", MS_NOSUID | MS_NODEV, options)
    (root / "box" / "program.py").write_text(spec["program"])
    (root / "old").mkdir()
    call("pivot_root", os.fsencode(root), os.fsencode(root / "old"))
    os.chdir("/box")
    call("umount2", b"/old", MNT_DETACH)
    Path("/old").rmdir()
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def show(path: Path, root: Path) -> None:
    """The same file, directory or link under the new root, not to be written."""
    target = root / path.relative_to("/")
    if path.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path.readlink())
        return
    if not path.exists():
        return
    if path.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount(path, target, None, MS_BIND)
    # Flags of the original must be repeated, or the kernel refuses to change any.
    kept = os.statvfs(target).f_flag & (2 | 4 | 8 | 1024 | 2048)
    mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept)


def drop_rights(as_root: bool) -> None:
    """No capability, now or by any program that is started; as root also another user."""
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(LAST_CAPABILITY + 1):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if as_root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = struct.pack("Ii", 0x20080522, 0)
    call("capset", header, bytes(24))


def become_program(spec: dict[str, Any], file: str, *, drop: bool) -> None:
    """Take the limits and turn into the program."""
    limits = spec["limits"]
    sizes = {
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_AS: limits["memory_mib"] << 20,
        resource.RLIMIT_FSIZE: limits["file_mib"] << 20,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
    }
    if drop:  # without a user of its own the count would be of all the user's processes
        sizes[resource.RLIMIT_NPROC] = limits["processes"]
    os.closerange(3, 1024)
    for name, value in sizes.items():
        # Out of CPU time a process gets a signal of its own, and a second later is killed.
        hardest = value + 1 if name == resource.RLIMIT_CPU else value
        resource.setrlimit(name, (value, hardest))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/box"}
    os.execve(spec["python"], [spec["python"], "-I", file], environment)


def wait_for(child: int) -> int:
    """The child's exit status, when it has ended."""
    _, status = os.waitpid(child, 0)
    return exit_code(status)


def exit_code(status: int) -> int:
    """As a shell has it: 128 and the signal's number for a killed process."""
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def mount(source: Any, target: Any, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2); any: a path or text."""
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
    call("mount", *words, ctypes.c_ulong(flags), options.encode() or None)


def call(name: str, *arguments: Any) -> None:  # what the system call takes
    """A function of the C library; raises `OSError` naming it."""
    if name == "pivot_root":
        result = LIBC.syscall(155 if os.uname().machine == "x86_64" else 41, *arguments)
    else:
        result = getattr(LIBC, name)(*arguments)
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def fail(error: OSError) -> None:
    """End this process, saying that there is no sandbox."""
    with contextlib.suppress(OSError):
        os.write(2, f"sandbox: {error}\n".encode())
    os._exit(SETUP_FAILED)


if __name__ == "__main__":
    spec_file = Path(sys.argv[1])
    try:
        sys.exit(main(json.loads(spec_file.read_text())))
    except OSError as problem:
        fail(problem)
