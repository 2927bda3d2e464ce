import os
import signal
import sys
from pathlib import Path

import pytest

from megadistill.launch.processes import LogFollower, Processes

SLEEP = [sys.executable, "-S", "-c", "import time; print('up', flush=True); time.sleep(600)"]


def test_slurms_signals_reach_neither_roles_nor_guard_not_even_while_they_start(
    tmp_path: Path,
) -> None:
    processes = Processes()
    processes.start("engine-0", SLEEP, os.environ, tmp_path / "log")
    assert processes._guard is not None
    for pid in (processes._guard.pid, processes.running["engine-0"].pid):
        os.kill(pid, signal.SIGUSR1)
        os.kill(pid, signal.SIGTERM)
    assert processes.next_exit(0.5) is None
    assert processes._guard.poll() is None
    processes.end(grace_s=10)
    assert not processes.running
    processes.close()


def test_exits_come_in_their_order_with_the_last_lines(tmp_path: Path) -> None:
    processes = Processes()
    for name, wait in (("late", 0.6), ("early", 0.0)):
        code = f"import sys, time; time.sleep({wait}); print('\\n'.join('abc')); sys.exit(5)"
        command = [sys.executable, "-S", "-c", code]
        processes.start(name, command, os.environ, tmp_path / name)
    exits = [processes.next_exit(20), processes.next_exit(20)]
    processes.close()
    assert [exited.name for exited in exits if exited] == ["early", "late"]
    assert exits[0] is not None
    assert exits[0].describe() == "early ended with exit code 5"
    assert exits[0].tail() == "a\nb\nc"


def test_a_log_is_followed_as_it_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.write_text("one\n")
    follower = LogFollower(log)
    follower.copy()
    with log.open("a") as stream:
        stream.write("two\n")
    follower.copy()
    follower.copy()
    assert capsys.readouterr().out == "one\ntwo\n"
