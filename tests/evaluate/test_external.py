"""LiveBench's own command, here a small stand-in for it, with a system behind a real endpoint."""

import json
import sys
from pathlib import Path

import pytest

from megadistill.config import ConfigError, EvaluateConfig, parse
from megadistill.evaluate import external
from megadistill.evaluate.requirements import check
from tests.evaluate.test_evaluation import World
from tests.inference.scripted import Endpoint, endpoint_tree

COMMAND = """
import json, os, sys, urllib.request
from pathlib import Path

words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert sys.argv[1] == "--resume" and words["--livebench-release-option"] == "2024-11-25"
tries = Path("data/tries")
tries.parent.mkdir(exist_ok=True)
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
if "--break" in words and len(tries.read_text()) == 1:
    sys.exit(3)
for task in ("math/a", "math/b", "language/c"):
    body = {"model": words["--model"], "messages": [{"role": "user", "content": task}]}
    key = os.environ[words["--api-key-name"]]
    request = urllib.request.Request(
        words["--api-base"] + "chat/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    answer = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
    category, name = task.split("/")
    row = {"question_id": task, "category": category, "task": name, "score": float(answer)}
    file = Path("data/live_bench") / task / "model_judgment" / "ground_truth_judgment.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({**row, "model": words["--model-display-name"]}) + "\\n")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    file = tmp_path / "LiveBench" / external.COMMAND
    file.parent.mkdir(parents=True)
    file.write_text(COMMAND)
    old = file.parent / "data" / "live_bench" / "x" / external.JUDGMENTS
    old.parent.mkdir(parents=True)
    old.write_text("of another model")
    return tmp_path / "LiveBench"


def world_of(tmp_path: Path, checkout: Path, url: str, options: list[str]) -> World:
    tool = {"checkout": str(checkout), "python": sys.executable, "options": options}
    tree = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "device": "cpu",
        "sandbox": "none",
        "systems": {"sys": endpoint_tree(url)},
        "benchmarks": {},
        "external": {"livebench": tool},
    }
    return World(tmp_path, {}, tree)


def test_a_systems_judgments_stand_in_the_table(tmp_path: Path, checkout: Path) -> None:
    scores = {"math/a": "1.0", "math/b": "0.5", "language/c": "0.25"}
    endpoint = Endpoint(lambda n, body: scores[body["messages"][0]["content"]])
    world = world_of(tmp_path, checkout, endpoint.url, ["--break", "1"])
    with pytest.raises(ValueError, match="ended with 3"):
        world.run()
    table = world.run()  # the second try goes on in the same copy
    assert "LiveBench 2024-11-25 (n=3)" in table
    assert "50.0" in table  # math 75, language 25
    assert [row["value"] for row in world.results("sys", "livebench")] == [0.25, 1.0, 0.5]
    summary = json.loads((tmp_path / "runs/tiny/results/sys/summary.json").read_text())
    assert summary["livebench"]["items"] == 3
    assert endpoint.headers[0]["Authorization"] == "Bearer none"
    world.run()
    assert world.runs == []
    assert not (checkout / "livebench/data/tries").exists()
    endpoint.stop()


def test_it_wants_to_be_told_that_there_is_no_sandbox(tmp_path: Path, checkout: Path) -> None:
    world = world_of(tmp_path, checkout, "http://localhost:1/v1", [])
    with pytest.raises(ConfigError, match="`external` runs programs without"):
        parse(EvaluateConfig, {**world.tree, "sandbox": "bubblewrap"})
    missing = {"checkout": str(tmp_path), "python": sys.executable}
    with pytest.raises(ValueError, match=r"no file .*run_livebench.py; expected a checkout"):
        check(parse(EvaluateConfig, {**world.tree, "external": {"livebench": missing}}))
