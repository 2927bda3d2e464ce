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

boxed = pytest.mark.skipif(bool(missing()), reason="no namespaces on this machine")
TESTING = '''
import io, json, sys

def run_test(sample, test=None, debug=False, timeout=6):
    """As the official function: results of the tests, ending at the first that fails."""
    sample = json.loads(sample["input_output"])
    found = []
    for given, expected in zip(sample["inputs"], sample["outputs"]):
        out, into = sys.stdout, sys.stdin
        sys.stdout, sys.stdin = io.StringIO(), io.StringIO(given)
        try:
            space = {}
            exec(test, space)
            said = sys.stdout.getvalue()
            if sample["fn_name"]:
                said = str(space[sample["fn_name"]](json.loads(given)))
        except Exception:
            return found + [-4], {}
        finally:
            sys.stdout, sys.stdin = out, into
        found.append(said.strip() == expected)
        if not found[-1]:
            return found, {}
    return found, {}
'''


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    file = tmp_path / "checkout" / livecodebench.TESTING
    file.parent.mkdir(parents=True)
    file.write_text(TESTING)
    return Tools(checkout=tmp_path / "checkout", sandbox="namespaces")


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


def test_a_forged_verdict_needs_the_mark() -> None:
    assert livecodebench.verdicts("abc [1, 1]\n[1, 1]\n", "secret") == []
    assert livecodebench.verdicts("x\nsecret [1, 0, 4]\n", "secret") == [1, 0, 4]


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
