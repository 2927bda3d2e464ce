"""No answer is not an answer of zero: every kind of it, counted, shown, ended, and never kept."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadistill import stats
from megadistill.evaluate.benchmarks import read_items
from megadistill.evaluate.benchmarks.recorded import scored
from megadistill.evaluate.results import Estimate, Rules, Scores, estimate, summarise
from tests.evaluate.test_coser import act, direct, scene_row
from tests.evaluate.test_evaluation import World, medqa_row
from tests.inference.scripted import Endpoint, completion, endpoint_tree

Script = Callable[[int, dict[str, Any]], Any]
Serve = Callable[[Script], Endpoint]
MANY = 40
SOME = 24
"""Of those that are judged."""


@pytest.fixture
def serve() -> Iterator[Serve]:
    started: list[Endpoint] = []

    def start(script: Script) -> Endpoint:
        started.append(Endpoint(script))
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.stop()


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def number_of(body: dict[str, Any]) -> int:
    return int(re.findall(r"question (\d+) \?", str(body["messages"]))[0])


def first_half_right(_: int, body: dict[str, Any]) -> Any:
    number = number_of(body)
    right = number < MANY // 2
    return f"Final answer: {'ABCD'[(number + (not right)) % 4]}"


def refusing(
    numbers: set[int], otherwise: Script, said: Any = (400, "no such parameter")
) -> Script:
    def script(number: int, body: dict[str, Any]) -> Any:
        return said if number_of(body) in numbers else otherwise(number, body)

    return script


def medqa(tmp_path: Path, systems: dict[str, Endpoint], **changes: Any) -> World:
    rows = [medqa_row(number) for number in range(MANY)]
    tree = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "device": "cpu",
        "systems": {name: endpoint_tree(one.url, concurrency=1) for name, one in systems.items()},
        "benchmarks": {"medqa": {"path": write(tmp_path / "medqa.jsonl", rows)}},
        **changes,
    }
    return World(tmp_path, {}, tree)


def table_rows(world: World) -> dict[str, dict[str, str]]:
    file = world.path / "runs/tiny/report/table.csv"
    return {row["system"]: row for row in csv.DictReader(file.open())}


def test_an_endpoint_that_refuses_all_ends_the_run_and_nothing_of_it_is_kept(
    tmp_path: Path, serve: Serve
) -> None:
    server = serve(lambda *_: (400, "unknown parameter: top_k"))
    world = medqa(tmp_path, {"sys": server})
    expected = (
        "models.sys: 8 requests in a row were refused with status 400; the last: unknown param"
    )
    with pytest.raises(ValueError, match=expected):
        world.run()
    assert len(server.bodies) == 8
    server.script = first_half_right
    assert "| sys | 50.0 [35.2, 64.8] |" in world.run()  # Wilson's of 20 in 40
    assert len(server.bodies) == 8 + MANY


def test_few_refusals_stand_beside_the_score_and_are_asked_again_by_the_next_call(
    tmp_path: Path, serve: Serve
) -> None:
    server = serve(refusing({3, 30}, first_half_right))
    world = medqa(tmp_path, {"sys": server})
    expected = stats.wilson(19, 38)
    shown = f"| sys | 50.0 [{100 * expected.low:.1f}, {100 * expected.high:.1f}]"
    assert f"{shown} (2 endpoint refused) |" in world.run()
    assert table_rows(world)["sys"]["holes"] == "2"
    holes = [row["item"] for row in world.results("sys") if row["hole"]]
    assert holes == ["q3", "q30"]
    server.script = first_half_right
    assert "| sys | 50.0 [35.2, 64.8] |" in world.run()
    assert world.runs == ["generate sys medqa", "score sys medqa"]
    assert len(server.bodies) == MANY + 2
    world.run()
    assert world.runs == []


def test_more_holes_than_allowed_are_no_number_and_stay_out_of_averages_and_tests(
    tmp_path: Path, serve: Serve
) -> None:
    good, bad = serve(first_half_right), serve(refusing({0, 10, 20}, first_half_right))
    world = medqa(tmp_path, {"good": good, "bad": bad, "too": good})
    table = world.run()
    assert "| good | **50.0 [35.2, 64.8]** | 50.0 |" in table
    assert (
        "| bad | no score, 3 of 40 answers have none: 3 endpoint refused | \N{EN DASH} |" in table
    )
    row = table_rows(world)["bad"]
    assert (row["score"], row["low"], row["high"], row["p_adjusted"], row["mark"]) == ("",) * 5
    assert table_rows(world)["too"]["p_adjusted"] == "1"
    summary = json.loads((tmp_path / "runs/tiny/results/bad/summary.json").read_text())["medqa"]
    assert (summary["score"], summary["holes"]) == (None, {"endpoint_refused": 3})
    for file in (tmp_path / "runs/tiny/report").iterdir():
        assert b"nan" not in file.read_bytes() or file.suffix == ".png"
    table = world.run(most_holes=0.1, systems={"bad": world.tree["systems"]["bad"]})
    assert re.search(r"\| bad \| 48.6 \[.*\] \(3 endpoint refused\) \|", table)  # 18 of 37
    with_bad_baseline = world.run(baseline="bad")
    assert {row["mark"] for row in table_rows(world).values()} == {""}
    assert "| good | **50.0" in with_bad_baseline


def test_cut_answers_and_those_without_a_letter_are_counted_beside_the_score(
    tmp_path: Path, serve: Serve
) -> None:
    def script(number: int, body: dict[str, Any]) -> Any:
        if number_of(body) in (0, 1, 2):
            return 200, completion("I wonder", "length")
        return "I do not know" if number_of(body) == 3 else first_half_right(number, body)

    world = medqa(tmp_path, {"sys": serve(script)})
    assert re.search(r"\| sys \| 40.0 \[.*\] \(4 no answer, 3 cut\) \|", world.run())


def question(number: int) -> str:
    return f"question {number} ?"


JUDGED: dict[str, Callable[[int], dict[str, Any]]] = {
    "hmmt25": lambda n: {"problem_idx": n, "problem": question(n), "answer": "yes"},
    "gpqa_diamond": lambda n: {
        "Question": question(n),
        "Correct Answer": "yes",
        **{f"Incorrect Answer {k}": f"no{k}" for k in (1, 2, 3)},
    },
    "d_acc": lambda n: {"question": question(n), "answer": "yes"},
    "ms_bench": lambda n: {
        "conversations": [
            {"from": "human", "value": question(n)},
            {"from": "gpt", "value": "yes"},
        ]
    },
    "coser": lambda n: scene_row(n) | {"scenario": question(n)},
}


def judged(tmp_path: Path, kind: str, system: Endpoint, judge: Endpoint) -> World:
    rows = [JUDGED[kind](number) for number in range(SOME)]
    benchmark = {
        "path": write(tmp_path / "items.jsonl", rows),
        "kind": kind,
        "judge": "critic",
        "samples": 1,
    }
    tree = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "device": "cpu",
        "systems": {"sys": endpoint_tree(system.url)},
        "models": {"critic": endpoint_tree(judge.url, concurrency=1)},
        "benchmarks": {"exam": benchmark},
    }
    return World(tmp_path, {}, tree)


def is_critic(body: dict[str, Any]) -> bool:
    """Not asked to play a part in a scene."""
    system = str(body["messages"][0]["content"])
    return "takes the next turn" not in system and "You are the world" not in system


def says(kind: str) -> Script:
    """A judge that finds every answer right, but for the scenes, which have one flaw each."""
    return direct if kind == "coser" else lambda *_: "<decision>yes</decision>"


@pytest.mark.parametrize("kind", JUDGED)
@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "I would rather not.",
            "8 replies in a row could not be read; the last: 'I would rather not",
        ),
        (
            '{"error": "busy"}',
            '8 replies in a row could not be read; the last: \'{"error": "busy"}\'',
        ),
        ("<think>yes", "8 replies in a row could not be read; the last: '<think>yes'"),
        (
            (400, "bad effort"),
            "8 requests in a row were refused with status 400; the last: bad effort",
        ),
    ],
)
def test_a_judge_of_no_use_ends_the_run_and_a_mended_one_goes_on(
    tmp_path: Path, serve: Serve, kind: str, said: Any, message: str
) -> None:
    system = serve(act if kind == "coser" else lambda *_: "I say so")
    judge = serve(lambda n, body: said if is_critic(body) else direct(n, body))
    world = judged(tmp_path, kind, system, judge)
    with pytest.raises(ValueError, match=re.escape(f"models.critic: {message}")):
        world.run()
    asked = len(system.bodies)
    judge.script = says(kind)
    assert ("| 91.0 [" if kind == "coser" else "| 100.0 [") in world.run()
    assert len(system.bodies) == asked


@pytest.mark.parametrize("kind", JUDGED)
def test_few_unreadable_verdicts_are_counted_and_asked_for_again(
    tmp_path: Path, serve: Serve, kind: str
) -> None:
    """Of a verifier one counts as no, as its paper says; a scene without a verdict does not count."""
    system = serve(act if kind == "coser" else lambda n, body: f"I say so about {number_of(body)}.")

    def moody(number: int, body: dict[str, Any]) -> Any:
        return "no idea" if is_critic(body) and number_of(body) == 7 else says(kind)(number, body)

    judge = serve(moody)
    world = judged(tmp_path, kind, system, judge)
    table = world.run()
    value = 91.0 if kind == "coser" else 95.8
    assert re.search(rf"\| sys \| {value} \[.*\] \(1 verdict unreadable\) \|", table)
    assert sum(row["hole"] == "verdict_unreadable" for row in world.results("sys", "exam")) == 1
    judge.script = says(kind)
    before = len(judge.bodies)
    table = world.run()
    assert ("91.0" if kind == "coser" else "100.0") in table
    assert "unreadable" not in table
    assert world.runs == ["score sys exam"]
    assert len(judge.bodies) == before + (4 if kind == "coser" else 1)


def test_games_without_a_verdict_are_counted_and_have_no_part_in_the_mean(
    tmp_path: Path, serve: Serve
) -> None:
    pytest.importorskip("eval_framework.tasks.arena_hard_task")
    told = next(iter(read_items("arena_hard_hp", "packaged"))).text

    def judge(number: int, body: dict[str, Any]) -> str:
        """The second game is won by far, the first is even; the judge has nothing to say of one item."""
        text = body["messages"][-1]["content"]
        if told in text:
            return "no idea"
        is_first = text.index("I say so") > text.index("Assistant B")
        return "[[A=B]]" if is_first else "[[A>>B]]"

    world = judged(tmp_path, "d_acc", serve(lambda *_: "I say so"), server := serve(judge))
    chosen = {"kind": "arena_hard_hp", "limit": SOME, "judge": "critic"}
    table = world.run(benchmarks={"exam": chosen})
    # Three entries of 1 and one of 1/2 for each of the others.
    assert re.search(r"\| sys \| 87.5 \[87.5, 87.5\] \(1 verdict unreadable\) \|", table)
    assert "with style control: sys" in table
    server.script = lambda *_: "no idea"
    critic = world.tree["models"]["critic"] | {"model": "another"}
    with pytest.raises(
        ValueError, match="8 replies in a row could not be read; the last: 'no idea'"
    ):
        world.run(benchmarks={"exam": chosen}, models={"critic": critic})


def test_a_value_that_is_no_number_is_a_hole_and_no_interval_is_nan() -> None:
    values = [1.0, math.nan, 0.0, math.inf]
    found = summarise([scored(f"q{n}", value, "all") for n, value in enumerate(values)], "none")
    assert dict(found.holes) == {"not_scored": 1, "not_a_number": 1}

    def estimated(scores: Scores, most_holes: float) -> Estimate:
        return estimate([scores], Rules(most_holes=most_holes), is_share=True)

    none = estimated(found, 0.05)
    assert none.interval is None
    assert none.remark.startswith("no score, 2 of 4 answers have none: ")
    assert estimated(found, 0.5).interval == stats.wilson(1, 2)
    empty = summarise([scored("q", math.nan, "all")], "none")
    assert estimated(empty, 1.0).interval is None


def test_a_hole_leaves_the_others_of_its_task_and_category_their_weight() -> None:
    values = {"math/a": [1.0, 0.0, math.nan], "math/b": [1.0], "code/c": [0.0, math.nan]}
    rows = [
        scored(f"{group}{n}", value, group)
        for group, some in values.items()
        for n, value in enumerate(some)
    ]
    found = summarise(rows, "mean_of_means")
    # math: (1/2 + 1) / 2, code: 0
    assert np.average(found.values_I, weights=found.weights_I) == pytest.approx(0.375)


def test_an_item_that_one_seed_lacks_counts_for_none() -> None:
    seeds = [
        summarise([scored(f"q{n}", value, "all") for n, value in enumerate(values)], "none")
        for values in ([1.0, math.nan, 0.0], [1.0, 0.0, 1.0])
    ]
    found = estimate(seeds, Rules(most_holes=0.5), is_share=True)
    assert found.interval is not None
    assert found.interval.value == pytest.approx(0.75)
    assert (found.answers, found.holes) == (6, 1)


def test_more_items_and_other_blocks_ask_for_nothing_that_is_there(
    tmp_path: Path, serve: Serve
) -> None:
    server = serve(first_half_right)
    world = medqa(tmp_path, {"sys": server}, shards={"count": 2, "block": 4})
    chosen = world.tree["benchmarks"]["medqa"]
    world.run(benchmarks={"medqa": chosen | {"limit": 30}})
    assert "| sys | 50.0 [35.2, 64.8] |" in world.run(shards={"count": 3, "block": 7})
    assert len(server.bodies) == MANY
