"""Programs that models wrote, tested in the sandbox by a small stand-in for LiveCodeBench's code."""

import base64
import json
import pickle
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megadistill.config import EvaluateConfig, parse
from megadistill.evaluate.benchmarks import livecodebench, read_items
from megadistill.evaluate.protocol import Item, Tools
from megadistill.evaluate.requirements import check
from megadistill.evaluate.sandbox import missing
from tests.evaluate.test_evaluation import World
from tests.inference.scripted import Endpoint, endpoint_tree

boxed = pytest.mark.skipif(bool(missing()), reason="no bubblewrap on this machine")
TESTING = '''
import io, json, signal, sys
from types import ModuleType
from unittest.mock import patch

class Capturing(list):
    def __enter__(self):
        self.out, sys.stdout = sys.stdout, io.StringIO()
        return self

    def __exit__(self, *args):
        self.append(sys.stdout.getvalue())
        sys.stdout = self.out

def reliability_guard():
    import os
    os.kill = os.fork = None

def compile_code(code, timeout):
    module = ModuleType("tmp_sol")
    exec(code, module.__dict__)
    return module

def get_function(solution, name):
    return getattr(solution, name, None)

def call_method(method, inputs):
    with patch("sys.stdin", io.StringIO(inputs)):
        method()

def stop(number, frame):
    raise TimeoutError("timeoutexception")

def run_test(sample, test=None, debug=False, timeout=6):
    """As the official function: results of the tests, ending at the first that fails."""
    signal.signal(signal.SIGALRM, stop)
    reliability_guard()
    sample = json.loads(sample["input_output"])
    name = sample["fn_name"]
    if name is None:
        lines = ["def wrapped_function():", *test.split("\\n"), "pass"]
        test = "\\n    ".join(lines)
    solution = compile_code(test, timeout)
    method = get_function(solution, name or "wrapped_function")
    found = []
    for given, expected in zip(sample["inputs"], sample["outputs"]):
        signal.alarm(timeout)
        try:
            if name is None:
                with Capturing() as captured:
                    call_method(method, given)
                found.append(captured[0].strip() == expected)
            else:
                found.append(bool(method(json.loads(given)) == json.loads(expected)))
        except Exception as error:
            return found + [-3 if "timeoutexception" in repr(error) else -4], {}
        finally:
            signal.alarm(0)
        if not found[-1]:
            return found, {}
    return found, {}
'''


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    file = tmp_path / "checkout" / livecodebench.TESTING
    file.parent.mkdir(parents=True)
    file.write_text(TESTING)
    return Tools(checkout=tmp_path / "checkout", sandbox="bubblewrap")


def row(day: str = "2025-02-10", function: str | None = None, name: str = "p1") -> dict[str, Any]:
    tests = [{"input": str(n), "output": str(2 * n), "testtype": "stdin"} for n in range(4)]
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests[1:])))).decode()
    return {
        "question_id": name,
        "question_content": "Double the number.",
        "contest_date": f"{day}T00:00:00",
        "starter_code": "def twice(x):" if function else "",
        "public_test_cases": json.dumps(tests[:1]),
        "private_test_cases": packed,
        "metadata": json.dumps({"func_name": function} if function else {}),
    }


def item(function: str | None = None) -> Item:
    found = livecodebench.to_item(row(function=function), "livecodebench_v6")
    assert found is not None
    return found


def block(program: str) -> str:
    return f"Here:\n```python\nno\n```\nbetter:\n```python\n{program}\n```\nDone."


def test_a_version_is_a_window_of_contests(tmp_path: Path) -> None:
    days = ["2024-07-31", "2024-08-01", "2025-01-31", "2025-02-01", "2025-04-30", "2025-05-01"]
    rows = [row(day, name=day) for day in days]
    file = tmp_path / "lcb.jsonl"
    file.write_text("".join(json.dumps(given) + "\n" for given in rows))
    found = {v: [i.id for i in read_items(f"livecodebench_{v}", str(file))] for v in ("v5", "v6")}
    assert found == {"v5": days[1:3], "v6": days[3:5]}


def test_the_question_has_the_starter_code_and_no_hidden_test() -> None:
    assert "def twice(x):" in item("twice").messages[1]["content"]
    assert "stdin" in item().messages[1]["content"]
    assert row()["private_test_cases"] not in json.dumps(item().messages)


@boxed
def test_hidden_tests_are_text_and_nothing_else_is_unpickled(tools: Tools) -> None:
    honest = item()
    packed = base64.b64encode(zlib.compress(pickle.dumps(print))).decode()
    poisoned = replace(honest, reference={**honest.reference, "hidden": packed})
    program = block("print(2 * int(input()))")
    assert livecodebench.run(honest, program, tools).value == 1.0
    assert livecodebench.run(poisoned, program, tools).details["passed"] == 0.0


@boxed
@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("print(2 * int(input()))", 1.0),
        ("print(int(input()) ** 2)", 0.25),
        ("raise SystemError", 0.0),
        ("import os; os._exit(0)", 0.0),
        ("import socket; socket.create_connection(('1.1.1.1', 53)); print(0)", 0.0),
        ("print(open('/etc/passwd').read())", 0.0),
    ],
)
def test_a_program_is_right_when_all_tests_pass(tools: Tools, program: str, passed: float) -> None:
    found = livecodebench.run(item(), block(program), tools)
    assert (found.value, found.details["passed"]) == (float(passed == 1.0), passed)
    assert found.extracted == program


@boxed
def test_functions_are_called(tools: Tools) -> None:
    found = livecodebench.run(item("twice"), block("def twice(x):\n    return 2 * x"), tools)
    assert found.value == 1.0


def test_an_answer_without_a_program_is_wrong(tools: Tools) -> None:
    assert livecodebench.run(item(), "I cannot.", tools).details["no_program"] == 1.0


WRITES_EVERYWHERE = """
import os
for n in range(64):
    try:
        os.write(n, b"[1, 1, 1, 1, 4]")
    except OSError:
        pass
os._exit(0)
"""
EQUALS_EVERYTHING = """
class Same:
    __eq__ = lambda *_: True
def twice(x):
    return Same()
"""
CHANGES_THE_TESTS = """
import sys
def twice(x):
    sys.modules["__main__"].json.dumps = lambda *_: "[1, 1, 1, 1, 4]"
    frame = sys._getframe()
    while frame:
        frame.f_globals["print"] = frame.f_globals["int"] = lambda *_, **__: 1
        frame = frame.f_back
"""
SEARCHES = """
import ctypes, gc, os, stat, sys
libc = ctypes.CDLL(None, use_errno=True)
def twice(x):
    seen = [repr(o) for o in gc.get_objects() if type(o) in (dict, list, tuple)]
    frame = sys._getframe()
    while frame:
        seen.append(repr(frame.f_locals))
        frame = frame.f_back
    wanted = "1234567"  # backwards, for else this would be what it finds
    found = any(wanted in text[::-1] for text in seen)
    attached = libc.ptrace(16, os.getppid(), 0, 0) == 0 or libc.syscall(438, 3, 1, 0) >= 0
    opened = [n for n in range(64) if is_file(n)]
    return int(wanted[::-1]) if found or attached or opened else 0
def is_file(n):
    try:
        return stat.S_ISREG(os.fstat(n).st_mode)
    except OSError:
        return False
"""


@boxed
@pytest.mark.parametrize("program", [WRITES_EVERYWHERE, EQUALS_EVERYTHING, CHANGES_THE_TESTS])
def test_no_program_gives_itself_a_verdict(tools: Tools, program: str) -> None:
    assert livecodebench.run(item("twice"), block(program), tools).details["passed"] == 0.0


@boxed
def test_a_program_finds_neither_the_expected_outputs_nor_a_way_to_the_driver(tools: Tools) -> None:
    tests = json.dumps([{"input": "1", "output": "7654321", "testtype": "functional"}])
    reference = {"public": tests, "hidden": "[]", "function": "twice"}
    secret = replace(item("twice"), reference=reference)
    assert livecodebench.run(secret, block(SEARCHES), tools).details["passed"] == 0.0
    knowing = "def twice(x):\n    return 7654321"
    assert livecodebench.run(secret, block(knowing), tools).details["passed"] == 1.0


@boxed
@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("2 * x", True),
        ("float(2 * x)", True),
        ("__import__('numpy').int64(2 * x)", True),
        ("str(2 * x)", False),
        ("print", False),
    ],
)
def test_an_answer_is_a_plain_value(tools: Tools, answer: str, right: bool) -> None:
    found = livecodebench.run(item("twice"), block(f"def twice(x):\n    return {answer}"), tools)
    assert found.value == float(right)


@boxed
def test_what_a_program_keeps_lasts_to_its_next_test(tools: Tools) -> None:
    program = "seen = []\ndef twice(x):\n    seen.append(x)\n    return 2 * x * (len(seen) - x)"
    assert livecodebench.run(item("twice"), block(program), tools).value == 1.0


@boxed
def test_a_test_that_takes_too_long_is_not_passed(
    tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(livecodebench, "TEST_S", 1)
    program = "def twice(x):\n    while x == 2:\n        pass\n    return 2 * x"
    found = livecodebench.run(item("twice"), block(program), tools)
    assert found.details == {"no_program": 0.0, "timed_out": 0.0, "passed": 0.5}


@boxed
def test_programs_are_written_and_scored_by_the_command(tmp_path: Path, tools: Tools) -> None:
    rows = [row(name=f"p{n}") for n in range(3)]
    file = tmp_path / "lcb.jsonl"
    file.write_text("".join(json.dumps(given) + "\n" for given in rows))
    endpoint = Endpoint(lambda n, body: block("print(2 * int(input()))") if n else "no idea")
    config = {"path": str(file), "checkout": str(tools.checkout)}
    tree = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "device": "cpu",
        "systems": {"coder": endpoint_tree(endpoint.url, concurrency=1)},
        "benchmarks": {"livecodebench_v6": config},
    }
    world = World(tmp_path, {}, tree)
    assert "LCB v6 (part) (n=3)" in world.run()
    values = [found["value"] for found in world.results("coder", "livecodebench_v6")]
    assert sorted(values) == [0.0, 1.0, 1.0]
    endpoint.stop()


def test_without_its_code_nothing_begins(tmp_path: Path) -> None:
    benchmarks = {"livecodebench_v5": {"path": "x.jsonl", "checkout": str(tmp_path)}}
    systems = {"a": endpoint_tree("http://localhost:1/v1")}
    config = parse(EvaluateConfig, {"name": "t", "systems": systems, "benchmarks": benchmarks})
    with pytest.raises(ValueError, match=r"expected a directory with lcb_runner/.*concatenated"):
        check(config)
