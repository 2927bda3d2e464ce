"""Programs that try to get out of the sandbox, and what is left of the machine after them."""

import os
import platform
import sys
import time
from pathlib import Path

import psutil
import pytest

from megadistill.evaluate import sandbox
from megadistill.evaluate.sandbox import Limits, Outcome, missing, run_python

pytestmark = pytest.mark.skipif(bool(missing()), reason="no bubblewrap on this machine")
PATIENT = Limits(wall_s=20.0, cpu_s=3)


def run(program: str, stdin: str = "", limits: Limits = PATIENT) -> Outcome:
    return run_python(program, stdin, limits)


def attempt(statement: str) -> str:
    """What a statement raises inside, or `done`."""
    lines = [f"    {line}" for line in statement.splitlines()]
    program = "\n".join(["import os, socket, sys", "try:", *lines, "    print('done')"])
    found = run(f"{program}\nexcept Exception as e:\n    print(type(e).__name__, e)")
    return found.stdout.strip()


def test_a_program_reads_its_input_and_uses_the_standard_library() -> None:
    program = "import sys, math, json\nprint(json.dumps([math.comb(5, 2), sys.stdin.read()]))"
    found = run(program, "given\n")
    assert (found.code, found.stdout, found.stderr) == (0, '[10, "given\\n"]\n', "")
    assert run("raise SystemExit(3)").code == 3
    assert "ZeroDivisionError" in run("1 / 0").stderr


def test_there_is_no_network() -> None:
    assert "Network is unreachable" in attempt("socket.create_connection(('1.1.1.1', 53), 1)")
    assert "gaierror" in attempt("socket.getaddrinfo('example.org', 80)")
    names = run("import socket; print([name for _, name in socket.if_nameindex()])").stdout
    assert names == "['lo']\n"


def test_home_and_everything_else_of_the_user_is_not_there(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("token")
    here = Path(__file__).resolve()
    paths = [str(secret), str(here), "/etc/passwd", "/etc/shadow", "/proc/1/environ"]
    found = run(f"import os\nprint([os.path.exists(path) for path in {paths}])")
    assert found.stdout == f"{[False] * len(paths)}\n"
    visible = run("import os; print(os.path.exists(os.path.expanduser('~root/.ssh')))").stdout
    assert visible == "False\n"
    assert os.environ["MEGADISTILL_CACHE"] not in run("import os; print(os.environ)").stdout


def test_nothing_outside_can_be_written() -> None:
    paths = ["/usr/lib/x", "/x", f"{sys.base_prefix}/lib/x", "/etc/ld.so.cache", "/dev/x"]
    program = (
        f"for path in {[*paths, '/box/mine']}:\n    try:\n        open(path, 'w').write('x')\n"
        "    except OSError:\n        continue\n    print(path)"
    )
    assert run(program).stdout == "/box/mine\n"


def test_no_right_can_be_had_back() -> None:
    assert "PermissionError" in attempt("os.setuid(0)") or os.geteuid() != 0
    tried = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "bad = [libc.mount(b'none', b'/box', b'tmpfs', 0, None),"
        " libc.umount2(b'/usr', 2), libc.sethostname(b'x', 1), libc.chroot(b'/box')]\nprint(bad)"
    )
    assert run(tried).stdout == "[-1, -1, -1, -1]\n"


def test_a_fork_bomb_ends_with_its_time_and_leaves_no_process() -> None:
    begun = time.monotonic()
    bomb = (
        "import os, sys\nif sys.argv[-1] != 'bomb':\n"
        "    os.execv(sys.executable, [sys.executable, '-I', '/box/program.py', 'bomb'])\n"
        "while True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    )
    found = run(bomb, limits=Limits(wall_s=1.5, cpu_s=5))
    assert found.timed_out
    assert time.monotonic() - begun < 15
    assert [pid for pid in psutil.pids() if "/box/program.py bomb" in command(pid)] == []


def command(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


def test_the_number_of_processes_is_limited() -> None:
    program = (
        "import os, time\ncount = 0\ntry:\n    while True:\n"
        "        if os.fork() == 0:\n            time.sleep(30)\n            os._exit(0)\n"
        "        count += 1\nexcept OSError as error:\n    print(count, error.errno)\n"
    )
    found = run(program, limits=Limits(wall_s=8, processes=16))
    count, number = map(int, found.stdout.split())
    assert number == 11
    assert 8 <= count <= 16


def test_the_disk_cannot_be_filled() -> None:
    fill = (
        "import os\nfor n in range(100):\n    with open(f'/box/{n}', 'wb') as f:\n"
        "        for _ in range(8):\n            f.write(bytes(1 << 20))\n"
    )
    found = run(fill, limits=Limits(wall_s=20, disk_mib=32))
    assert "No space left on device" in found.stderr
    many = "for n in range(10**6):\n    open(f'/box/{n}', 'w').close()"
    assert "No space left on device" in run(many, limits=Limits(wall_s=20)).stderr


def test_shared_memory_is_part_of_the_disk_or_not_to_be_had() -> None:
    fill = (
        "import os\nfor n in range(100):\n    with open(f'/dev/shm/{n}', 'wb') as f:\n"
        "        for _ in range(8):\n            f.write(bytes(1 << 20))\n"
    )
    found = run(fill, limits=Limits(wall_s=20, disk_mib=32))
    assert "No space left on device" in found.stderr
    kept = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def made(call):\n    try:\n        return call() >= 0\n"
        "    except OSError:\n        return False\n"
        "print([made(lambda: libc.shmget(0, 1 << 20, 0o1600)),"
        " made(lambda: libc.msgget(0, 0o1600)), made(lambda: libc.semget(0, 1, 0o1600)),"
        " made(lambda: os.memfd_create('x')), made(lambda: libc.mq_open(b'/x', 66, 0o600, None))])"
    )
    assert run(kept).stdout == f"{[False] * 5}\n"
    shared = (
        "from multiprocessing import shared_memory as m\n"
        "one = m.SharedMemory(create=True, size=1 << 20)\none.buf[5] = 7\n"
        "two = m.SharedMemory(one.name)\nprint(two.buf[5])\none.unlink()"
    )
    assert run(shared).stdout == "7\n"


def test_there_are_no_namespaces_inside_of_the_box() -> None:
    number = {"x86_64": 56, "aarch64": 220}[platform.machine()]
    tried = (
        "import ctypes, subprocess\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "calls = [lambda: libc.unshare(0x10000000), lambda: libc.unshare(0x20000),"
        f" lambda: libc.syscall({number}, 0x10000000 | 17, 0, 0, 0, 0)]\n"
        "print([call() for call in calls])\n"
        "print(subprocess.run(['/usr/bin/unshare', '-U', 'true'], capture_output=True).returncode)"
    )
    assert run(tried).stdout == "[-1, -1, -1]\n1\n"


def test_a_program_cannot_look_into_the_process_that_started_it() -> None:
    tried = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "secret = ctypes.create_string_buffer(b'verdict')\n"
        "if os.fork() == 0:\n"
        "    got = ctypes.create_string_buffer(8)\n"
        "    vec = [(ctypes.c_size_t * 2)(ctypes.addressof(b), 8) for b in (got, secret)]\n"
        "    n = libc.process_vm_readv(os.getppid(), vec[0], 1, vec[1], 1, 0)\n"
        "    print(n, libc.ptrace(16, os.getppid(), 0, 0), got.value, flush=True)\n"
        "    fd = libc.syscall(434, os.getppid(), 0)\n"
        "    print(fd >= 0, libc.syscall(438, fd, 1, 0), flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()"
    )
    assert run(tried).stdout == "-1 -1 b''\nTrue -1\n"


def test_threads_and_programs_can_be_started() -> None:
    program = (
        "import subprocess, threading\nseen = []\n"
        "t = threading.Thread(target=seen.append, args=(1,))\nt.start()\nt.join()\n"
        "print(seen, subprocess.run(['/bin/echo', 'hi'], capture_output=True).stdout)"
    )
    assert run(program).stdout == "[1] b'hi\\n'\n"


@pytest.mark.parametrize("release", ["4.18.0-553.el8_10.x86_64", "5.13.19"])
def test_where_all_processes_of_a_user_count_the_limit_is_above_them(
    release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert sandbox.process_limit(16, release) > 16 + psutil.Process().num_threads() - 1
    assert sandbox.process_limit(16, "5.14.0-427.el9") == 16
    assert sandbox.process_limit(16, "6.1.0-18-amd64") == 16


def test_output_and_single_files_are_cut_off() -> None:
    found = run("while True: print('x' * 10**6)", limits=Limits(wall_s=20, file_mib=2))
    assert found.code != 0
    assert len(found.stdout) <= 2 << 20


def test_memory_and_time_are_limited() -> None:
    assert "MemoryError" in run("x = bytearray(1 << 32)", limits=Limits(memory_mib=512)).stderr
    assert run("import time; time.sleep(60)", limits=Limits(wall_s=0.5)).timed_out
    assert run("while True: pass", limits=Limits(wall_s=30, cpu_s=1)).timed_out


def test_the_parent_cannot_be_killed() -> None:
    program = (
        "import os, signal\nprint(os.getpid(), os.getppid(), flush=True)\n"
        "for pid in (1, os.getppid(), PARENT):\n    try:\n        os.kill(pid, signal.SIGKILL)\n"
        "    except OSError as error:\n        print(error.errno, flush=True)\n"
        "os.kill(-1, signal.SIGKILL)\nprint('alive', flush=True)"
    )
    found = run(program.replace("PARENT", str(os.getpid())))
    assert found.stdout.split()[:2] == ["2", "1"]
    assert run("print('next')").stdout == "next\n"


def test_a_machine_without_bubblewrap_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    problem = sandbox.missing.__wrapped__()
    assert problem is not None
    assert "install bubblewrap" in problem
    assert "sandbox: none" in problem


def test_without_a_sandbox_nothing_runs_unless_the_user_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "missing", lambda: "no sandbox here")
    with pytest.raises(ValueError, match="no sandbox here"):
        run_python("print(1)")
    assert run_python("print(1)", mode="none").stdout == "1\n"
    assert run_python("while True: pass", "", Limits(wall_s=2), mode="none").timed_out
