"""Scorers on recorded and hand-made answers."""

import asyncio
import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megadistill.evaluate import coser_gca
from megadistill.evaluate.benchmarks import arena_hard, get_benchmark, read_items, zebralogic
from megadistill.evaluate.benchmarks.recorded import read_recorded
from megadistill.evaluate.benchmarks.verified import by_mathematics, decision
from megadistill.evaluate.coser_gca import Line
from megadistill.evaluate.protocol import Item, Score
from megadistill.evaluate.results import summarise


def weighted_mean(scores: Sequence[Score]) -> float:
    weights = [score.weight for score in scores]
    return float(np.average([score.value for score in scores], weights=weights))


# W10: games of three questions.
GAMES = [("B>A", "A>>B"), ("A>>B", "B>A"), ("A=B", "A=B")]


def test_arena_hards_worked_example() -> None:
    found = [arena_hard.entries(*games) for games in GAMES]
    assert sum(map(len, found)) == 10
    assert 100 * np.mean(np.concatenate(found)) == 50.0
    item = Item(id="1", messages=(), text="q", reference={"baseline": "b"})
    scores = [
        arena_hard.score_replies(item, "", [f"so [[A>B]] or rather [[{a}]]", f"[[{b}]]"])
        for a, b in GAMES
    ]
    assert 100 * weighted_mean(scores) == pytest.approx(50.0)


def test_a_question_without_both_verdicts_weighs_nothing() -> None:
    item = Item(id="1", messages=(), text="q", reference={"baseline": "b"})
    scores = [
        arena_hard.score_replies(item, "", ["[[A<B]]", "no idea"]),
        arena_hard.score_replies(item, "", ["[[A<B]]", "[[A>B]]"]),
    ]
    assert [score.weight for score in scores] == [0.0, 2.0]
    assert weighted_mean(scores) == 1.0


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("[[A>B]]", "A>B"),
        ("My verdict is [A>>B].", "A>>B"),
        ("[[a=b]]", "A=B"),
        ("he says [[A>B]], I say [[B>A]]", "B>A"),
        ("[[A>B]] as in [B>A]", "A>B"),  # a double bracket wins, as in the official code
        ("[[C>A]]", None),
    ],
)
def test_a_judges_verdict_is_read_as_the_official_code_does(
    reply: str, expected: str | None
) -> None:
    assert arena_hard.verdict(reply) == expected


@pytest.mark.parametrize(("name", "size"), [("arena_hard_hp", 500), ("arena_hard_cw", 250)])
def test_the_bundled_baselines_against_themselves_get_the_official_aggregate(
    name: str, size: int
) -> None:
    """Each baseline's answer is judged by a script, and the sum is that of the package's own code."""
    task = pytest.importorskip("eval_framework.tasks.arena_hard_task")
    items = list(read_items(name, "packaged"))
    benchmark = get_benchmark(name)
    assert len(items) == size == benchmark.size
    verdicts = random.Random(0)
    scores, records = [], []
    assert benchmark.judged is not None
    for item in items:
        requests = benchmark.judged.requests(item, item.reference["baseline"])
        assert item.reference["baseline"] in requests[0].messages[1]["content"]
        assert requests[0].messages[0]["content"].startswith("Please act as an impartial judge")
        replies = [f"[[{verdicts.choice(list(arena_hard.ENTRIES))}]]" for _ in requests]
        scores.append(benchmark.judged.score_replies(item, "", replies))
        games = [{"score": reply.strip("[]")} for reply in replies]
        records.append({"uid": item.id, "category": item.reference["category"], "games": games})
    official = object.__new__(task.ArenaHardTask)
    official.weight = 3
    official._bootstrap_mean_ci = lambda values: (float(np.mean(values)), 0.0, len(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "iter_jsonl", lambda path: records)
        found = official.aggregate_winrate("")["overall"]
    assert weighted_mean(scores) == pytest.approx(found["winrate"], abs=1e-12)
    assert sum(score.weight for score in scores) == found["n"]


def test_the_judges_prompts_differ_in_who_answers_first() -> None:
    pytest.importorskip("eval_framework")
    own = "generating your own answer"
    for category, is_in in (("hard_prompt", True), ("creative_writing", False)):
        reference = {"category": category, "baseline": "b"}
        item = Item(id="1", messages=(), text="q", reference=reference)
        first, second = arena_hard.requests(item, "an answer")
        assert (own in first.messages[0]["content"]) == is_in
        assert first.messages[0] == second.messages[0]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("<extracted_answer>A</extracted_answer><decision>yes</decision>", True),
        ("<decision>yes</decision> wait <decision> NO </decision>", False),
        ("<Decision>Yes</Decision>", True),
        ("<decision>**yes**</decision>", True),
        ('<decision>"no."</decision>', False),
        ("yes", None),
        ("<decision>maybe</decision>", None),
        ("", None),
    ],
)
def test_the_last_decision_of_a_verifier_counts(reply: str, expected: bool | None) -> None:
    assert decision(reply) is expected


@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [
        ("\\frac{1}{2}", "so it is \\boxed{0.5}", True),
        ("103", "the sum is $\\boxed{103}$.", True),
        ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}", True),
        ("103", "\\boxed{104}", False),
        ("103", "I do not know", False),
    ],
)
def test_mathematical_answers_are_compared_by_value(truth: str, answer: str, right: bool) -> None:
    pytest.importorskip("math_verify")
    item = Item(id="1", messages=(), text="q", reference=truth)
    assert by_mathematics(item, answer).value == float(right)


PUZZLE = {
    "id": "lgp-2x2-0",
    "puzzle": "There are 2 houses",
    "solution": {
        "header": ["House", "Name", "Drink"],
        "rows": [["1", "Ada", "milk"], ["2", "Ben", "tea"]],
    },
}
SOLVED = (
    '{"House 1": {"Name": "ada ", "Drink": ["Milk"]}, "House 2": {"Name": "Ben", "Drink": "tea"}}'
)


@pytest.mark.parametrize(
    ("answer", "value", "cells", "absent"),
    [
        (f'{{"reasoning": "...", "solution": {SOLVED}}}', 1.0, 1.0, 0.0),
        (f'```json\n{{"solution": {SOLVED}}}\n```\nDone {{}}', 1.0, 1.0, 0.0),
        (f'{{"solution": {{}}}} then {{"solution": {SOLVED}}} and {{"solution": {{"House', 1, 1, 0),
        (f'{{"solution": {SOLVED}}} {{"solution": {{"House 1": {{"Name": "Ada"}}}}}}', 0, 0.25, 0),
        (f'{{"solution": {SOLVED.replace("tea", "milk")}}}', 0.0, 0.75, 0.0),
        (f'{{"solution": {SOLVED.replace(chr(34) + "tea" + chr(34), "null")}}}', 0.0, 0.75, 0.0),
        ("House 1: Ada drinks milk", 0.0, 0.0, 1.0),
        ('{"solution": {"House 1": ', 0.0, 0.0, 1.0),
    ],
)
def test_zebras_last_complete_solution_is_compared_cell_by_cell(
    answer: str, value: float, cells: float, absent: float
) -> None:
    found = zebralogic.score(zebralogic.to_item(PUZZLE), answer)
    assert found.value == value
    assert found.details == {"cells": cells, "no_answer": absent}


def test_a_puzzle_whose_solution_is_hidden_is_refused() -> None:
    hidden = {"header": ["House", "Name"], "rows": [["___", "___"]]}
    with pytest.raises(ValueError, match="gated"):
        zebralogic.to_item(PUZZLE | {"solution": hidden})


def test_livebench_is_a_mean_of_means_of_means(tmp_path: Path) -> None:
    tasks = {"math/a": [1, 0], "math/b": [1, 1, 1, 0], "reasoning/c": [0, 0, 1, 1]}
    rows = [
        {
            "question_id": f"{group}{n}",
            "category": group.split("/")[0],
            "task": group.split("/")[1],
            "score": s,
        }
        for group, scores in tasks.items()
        for n, s in enumerate(scores)
    ]
    file = tmp_path / "ground_truth_judgment.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = summarise(read_recorded("livebench", file).rows, "mean_of_means")
    assert 100 * np.average(found.values_I, weights=found.weights_I) == pytest.approx(56.25)
    file.write_text('{"question_id": "q", "category": "math", "task": "a", "score": 57}')
    with pytest.raises(ValueError, match="row 1 has the score 57"):
        read_recorded("livebench", file)


def test_livebenchs_questions_can_be_looked_for_in_training_data(tmp_path: Path) -> None:
    row = {"question_id": "q", "category": "math", "task": "a", "turns": ["What is 2 + 2?"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    (item,) = read_items("livebench", str(tmp_path / "questions.jsonl"))
    assert (item.id, item.text, item.group) == ("q", "What is 2 + 2?", "math/a")


def test_livecodebench_takes_the_problems_of_its_window(tmp_path: Path) -> None:
    problems = [
        {"question_id": f"p{n}", "contest_date": f"{day}T00:00:00", "graded_list": graded}
        for n, (day, graded) in enumerate(
            [
                ("2024-07-31", [True]),
                ("2024-08-01", [True, False]),
                ("2025-01-31", [False, False]),
                ("2025-02-01", [True]),
                ("2025-05-01", [True]),
            ]
        )
    ]
    file = tmp_path / "x_eval_all.json"
    file.write_text(json.dumps(problems))
    five, six = (read_recorded(f"livecodebench_{v}", file).rows for v in ("v5", "v6"))
    assert summarise(five, "none").values_I.tolist() == [0.5, 0.0]
    assert summarise(six, "none").items == ("p3",)
    with pytest.raises(ValueError, match=r"lcb_runner"):
        read_recorded("livecodebench_v5", tmp_path / "none.json")


def test_gcas_worked_example() -> None:
    assert coser_gca.dimension_score([3, 5, 2], 12) == pytest.approx(68)
    assert coser_gca.dimension_score([], 12) == 100
    assert coser_gca.dimension_score([5] * 10, 8) == 0


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('[{"severity": 3}, {"severity": 5}, {"type": "x"}]', [3, 5, 1]),
        (
            '```json\n{"flaws": [{"severity": 2}, {"severity": "high"}, {"severity": 2.5}]}\n```',
            [2],
        ),
        ('{"Character Fidelity": {"flaws": [{"severity": 4}]}}', [4]),
        ('[{"severity": "3"}, {"severity": 3.0}, {"severity": true}]', [3, 3]),
        ('[{"severity": "high"}, {"severity": null}]', None),
        ('["none"]', None),
        ("[]", []),
        ('{"flaws": []}', []),
        ("{}", None),
        ('{"error": "too long"}', None),
        ("no flaws", None),
        ("[{broken", None),
    ],
)
def test_a_judges_flaws_are_read(reply: str, expected: list[int] | None) -> None:
    assert coser_gca.severities(reply) == expected


def test_a_scene_follows_the_turn_rules() -> None:
    replies = iter(["Ben", "Ben", "<END CHAT>", "Zoe", "Ada", "Environment", "<END CHAT>", "Ada"])
    heard: list[list[str]] = []

    async def speak(name: str, scene: Sequence[Line]) -> str:
        heard.append([line.heard for line in scene])
        return f"[secret of {name}] (nods) I am {name}"

    async def predict(scene: Sequence[Line]) -> str:
        return next(replies)

    scene = asyncio.run(coser_gca.simulate(["Ada", "Ben", "Cy"], ["Ada", "Ben"], speak, predict))
    speakers = [line.speaker for line in scene]
    assert speakers[:2] == ["Ada", "Ben"]
    assert speakers[2] != "Ben"  # named again: somebody else at random
    assert len(speakers) == 7  # the end is heard from round index 5 on, and comes at 6
    assert all(a != b for a, b in pairwise(speakers))
    assert heard[1] == ["(nods) I am Ada"]
    assert set(speakers) <= {"Ada", "Ben", "Environment"}


def test_a_scene_ends_after_twenty_rounds_and_messages_of_the_environment_do_not_count() -> None:
    async def speak(name: str, scene: Sequence[Line]) -> str:
        return name

    async def predict(scene: Sequence[Line]) -> str:
        return "Ada" if scene[-1].speaker == "Environment" else "Environment"

    scene = asyncio.run(coser_gca.simulate(["Ada"], ["Ada"], speak, predict))
    assert len(scene) == 20
    flaws = dict.fromkeys(coser_gca.DIMENSIONS, '[{"severity": 5}]')
    scores = coser_gca.scene_scores(scene, flaws)
    assert set(scores.values()) == {90.0}  # 100 - 5 (5 - 0.3 x 10)
