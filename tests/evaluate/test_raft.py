"""RAFT's two judged benchmarks, with three scripted judges over real HTTP."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megadistill.config import ConfigError, EvaluateConfig, parse
from megadistill.evaluate.benchmarks import read_items
from megadistill.evaluate.benchmarks.raft import ms_bench_item
from megadistill.evaluate.protocol import Score
from megadistill.evaluate.scoring import majority
from tests.evaluate.test_evaluation import World
from tests.inference.scripted import Endpoint, endpoint_tree

Script = Callable[[int, dict[str, Any]], Any]


def strict(number: int, body: dict[str, Any]) -> str:
    """Right where the response is the reference."""
    text = body["messages"][-1]["content"]
    parts = {
        tag: text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0].strip()
        for tag in ("reference", "response")
    }
    verdict = "yes" if parts["reference"] == parts["response"] else "no"
    return f"Compared.\n<decision>{verdict}</decision>"


def lenient(number: int, body: dict[str, Any]) -> str:
    return "<decision>Yes</decision>"


def mute(number: int, body: dict[str, Any]) -> str:
    return "I would rather not say."


def answer(number: int, body: dict[str, Any]) -> str:
    """The system: right about even numbers."""
    found = int(body["messages"][-1]["content"].split()[-1])
    return f"it is {found if found % 2 == 0 else 'odd'}"


@pytest.fixture
def serve() -> Iterator[Callable[[Script], dict[str, Any]]]:
    started: list[Endpoint] = []

    def start(script: Script) -> dict[str, Any]:
        started.append(Endpoint(script))
        return endpoint_tree(started[-1].url)

    yield start
    for endpoint in started:
        endpoint.stop()


def evaluation(tmp_path: Path, serve: Callable[[Script], dict[str, Any]], *judges: Script) -> World:
    rows = [{"id": f"q{n}", "question": f"what is {n}", "answer": f"it is {n}"} for n in range(6)]
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [f"judge-{number}" for number in range(len(judges))]
    tree = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "device": "cpu",
        "systems": {"student": serve(answer)},
        "models": {name: serve(script) for name, script in zip(names, judges, strict=True)},
        "benchmarks": {"d_acc": {"path": str(file), "judge": names}},
    }
    return World(tmp_path, {}, tree)


@pytest.mark.parametrize(
    ("judges", "right", "unanimous"),
    [
        ((strict, strict, lenient), 3, 3),
        ((strict, lenient, lenient), 6, 3),
        ((strict, lenient, mute), 3, 0),  # who says nothing says no
    ],
)
def test_the_majority_of_three_judges_decides(
    tmp_path: Path,
    serve: Callable[[Script], dict[str, Any]],
    judges: tuple[Script, ...],
    right: int,
    unanimous: int,
) -> None:
    world = evaluation(tmp_path, serve, *judges)
    table = world.run()
    assert "D-Acc (n=6)" in table
    # Where the two others differ, the third one's yes would decide.
    is_open = mute in judges
    assert ("no score, 3 of 6 answers have none: 3 verdict unreadable" in table) == is_open
    rows = world.results("student", "d_acc")
    assert sum(row["value"] for row in rows) == right
    details = [json.loads(row["details"]) for row in rows]
    assert sum(found["unanimous"] for found in details) == unanimous
    assert len(json.loads(rows[0]["replies"])) == 3
    summary = json.loads((tmp_path / "runs/tiny/results/student/summary.json").read_text())
    assert summary["d_acc"]["judges"] == ["judge-0", "judge-1", "judge-2"]


def test_one_judges_score_is_left_as_it_is() -> None:
    score = Score(value=0.25, details={"x": 1.0})
    assert majority([score]) is score


def test_judges_that_cannot_vote_are_refused(
    tmp_path: Path, serve: Callable[[Script], dict[str, Any]]
) -> None:
    world = evaluation(tmp_path, serve, strict, strict, strict)
    several = {"judge": ["judge-0", "judge-1", "judge-2"]}
    with pytest.raises(ValueError, match="Arena-Hard v2 HP takes one"):
        world.run(benchmarks={"arena_hard_hp": several})
    with pytest.raises(ConfigError, match="expected an odd number, each once"):
        parse(
            EvaluateConfig,
            {**world.tree, "benchmarks": {"d_acc": {"judge": ["judge-0", "judge-1"]}}},
        )
    with pytest.raises(ConfigError, match="found 'nobody', expected one of"):
        parse(EvaluateConfig, {**world.tree, "benchmarks": {"d_acc": {"judge": "nobody"}}})


def dialogue(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": value} for speaker, value in turns]


def test_ms_bench_asks_the_first_question_of_a_dialogue() -> None:
    turns = dialogue(("human", "why?"), ("gpt", "because"), ("human", "really?"), ("gpt", "yes"))
    system = dialogue(("system", "You are a helpful assistant."))
    for conversations in (turns, json.dumps(turns), str([*system, *turns])):
        item = ms_bench_item({"row": 7, "conversations": conversations})
        assert item is not None
        assert (item.id, item.text, item.reference) == ("7", "why?", "because")


@pytest.mark.parametrize(
    "turns",
    [
        dialogue(("human", "I am MOSS"), ("gpt", "no")),
        dialogue(("human", "hi"), ("gpt", "Human: and so on")),
        dialogue(("human", "hi")),
        dialogue(("system", "Be a pirate."), ("human", "hi"), ("gpt", "arr")),
        dialogue(("human", " "), ("gpt", "x")),
    ],
)
def test_ms_bench_leaves_other_dialogues_out(turns: list[dict[str, str]]) -> None:
    assert ms_bench_item({"row": 1, "conversations": turns}) is None


def test_ms_bench_is_the_same_two_hundred_dialogues_in_any_order(tmp_path: Path) -> None:
    rows = [
        {"id": n, "conversations": dialogue(("human", f"q{n}"), ("gpt", f"a{n}"))}
        for n in range(900)
    ]
    found = []
    for order in (rows, rows[::-1]):
        file = tmp_path / "ms.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in order))
        found.append([item.id for item in read_items("ms_bench", str(file))])
    assert found[0] == found[1]
    assert len(set(found[0])) == 200
    file.write_text(json.dumps({"conversations": "[{"}))
    with pytest.raises(ValueError, match="row 1: conversations: neither JSON nor a Python list"):
        list(read_items("ms_bench", str(file)))
