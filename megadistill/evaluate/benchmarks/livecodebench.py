"""LiveCodeBench v5 and v6: programs run against hidden tests by LiveCodeBench's own code, sandboxed.

Each version is a window of contest dates. The question is put in our words, in the official form.
"""

import json
import re
import sysconfig
from datetime import date
from functools import partial
from pathlib import Path

from megadistill.evaluate.protocol import Benchmark, Fields, Item, Score, Tools
from megadistill.evaluate.sandbox import Limits, run_python
from megadistill.inference.templates import load_template

WINDOWS = {
    "livecodebench_v5": (date(2024, 8, 1), date(2025, 2, 1)),
    "livecodebench_v6": (date(2025, 2, 1), date(2025, 5, 1)),
}
"""Contest dates, from the first day to before the last; 279 and 175 problems if the paper's (I)."""
TESTING = Path("lcb_runner/evaluation/testing_util.py")
"""In a checkout: what runs a program against tests."""
TEST_S = 6
"""Seconds of one test, as there."""
LIMITS = Limits(wall_s=600.0, cpu_s=600, memory_mib=6144, file_mib=64)
"""Of all tests of one program together; the tests end at the first that fails."""
TEMPLATE = "packaged:livecodebench-v1"
WITH_STARTER = "Complete this code, and enclose all of the program in a code block:"
FROM_STDIN = (
    "Read the input from stdin and write the answer to stdout; do not test on the examples. Enclose "
    "the program in a code block:"
)
_FENCE = re.compile(r"```")
DRIVER = Path(__file__).with_name("livecodebench_driver.py")


def to_item(row: Fields, version: str) -> Item | None:
    """A problem of code_generation_lite; None outside of the version's window."""
    first, end = WINDOWS[version]
    if not first <= date.fromisoformat(row["contest_date"][:10]) < end:
        return None
    starter = row["starter_code"]
    values = {
        "question": row["question_content"],
        "format": WITH_STARTER if starter else FROM_STDIN,
        "code": starter or "# the program",
    }
    return Item(
        id=str(row["question_id"]),
        messages=tuple(load_template(TEMPLATE, tuple(values)).fill(values)),
        text=row["question_content"],
        reference={
            "public": row["public_test_cases"],
            "hidden": row["private_test_cases"],
            "function": json.loads(row["metadata"]).get("func_name"),
        },
    )


def program_of(answer: str) -> str | None:
    """What stands between the last two lines with a fence."""
    lines = answer.split("\n")
    fences = [number for number, line in enumerate(lines) if _FENCE.search(line)]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else None


def run(item: Item, answer: str, tools: Tools) -> Score:
    """1 when every test passes; the details have their share and why there is none."""
    program = program_of(answer)
    details = {"no_program": float(program is None), "timed_out": 0.0, "passed": 0.0}
    if program is None:
        return Score(value=0.0, details=details)
    packages = sysconfig.get_paths()["platlib"]
    given = {
        **item.reference,
        "program": program,
        "packages": packages,
        "testing": (tools.checkout / TESTING).read_text(encoding="utf-8"),
        "seconds": TEST_S,
    }
    outcome = run_python(
        DRIVER.read_text(encoding="utf-8"),
        json.dumps(given),
        LIMITS,
        mode=tools.sandbox,
        readable=[Path(packages)],  # it needs numpy
    )
    details["timed_out"] = float(outcome.timed_out)
    if outcome.stdout:
        *each, total = json.loads(outcome.stdout)
        details["passed"] = sum(result > 0 for result in each) / total
    return Score(value=float(details["passed"] == 1.0), extracted=program, details=details)


def _benchmark(version: str, title: str, size: int) -> Benchmark:
    return Benchmark(
        title=title,
        rows=partial(to_item, version=version),
        run=run,
        needs=TESTING,
        hint=(
            "the test*.jsonl of the hub's livecodebench/code_generation_lite, concatenated; the "
            "programs are tested by a checkout of github.com/LiveCodeBench/LiveCodeBench, which "
            "`checkout` names. Or run that evaluator, and name its *_eval_all.json in `recorded`"
        ),
        size=size,
    )


V5 = _benchmark("livecodebench_v5", "LCB v5", 279)
V6 = _benchmark("livecodebench_v6", "LCB v6", 175)
