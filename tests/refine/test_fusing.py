"""Fusion against scripted endpoints."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megadistill.config.refine import EndpointConfig, FusionConfig
from megadistill.data.records import Record
from megadistill.inference.chat import open_endpoint
from megadistill.inference.templates import load_template
from megadistill.launch.shards import ShardFolder
from megadistill.refine.assembly import describe
from megadistill.refine.blocks import read_blocks
from megadistill.refine.checking import Rules
from megadistill.refine.fusing import (
    FUSE_FIELDS,
    JUDGE_FIELDS,
    Candidate,
    Fuser,
    best,
    good_enough,
    parse_score,
)
from tests.inference.scripted import Endpoint, completion, endpoint_tree
from tests.refine.test_pipeline import fusion_changes, good_model, whole
from tests.refine.world import is_judged, make_world

RECORD = Record(
    index=0, id="r", prompt=({"role": "user", "content": "What is it?"},), answer="It is a fig."
)
Serve = Callable[..., Endpoint]


@pytest.fixture
def serve() -> Iterator[Serve]:
    running: list[Endpoint] = []

    def start(script: Callable[[int, dict[str, Any]], Any]) -> Endpoint:
        running.append(Endpoint(script))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def fuse(server: Endpoint, judges: Sequence[str] = ("strong",)) -> dict[str, Any]:
    """The row of the record; every judge lies behind the same endpoint."""

    async def run() -> dict[str, Any]:
        config = EndpointConfig(**endpoint_tree(server.url))
        models = {name: open_endpoint(name, config) for name in {"strong", *judges}}
        fuser = Fuser(
            settings=FusionConfig(model="strong", judges=list(judges)),
            models=models,
            template=load_template("packaged:fuse-v1", FUSE_FIELDS),
            judge_template=load_template("packaged:judge-v1", JUDGE_FIELDS),
            rules=Rules(phrases=["reference answer"], openings=[], check_final_answer=True),
        )
        row = await fuser.fuse_record(RECORD, "Indeed, a fig.")
        for model in models.values():
            await model.close()
        return row

    return asyncio.run(run())


def scored(*scores: Any, answer: str = "A fig, then.") -> Callable[[int, dict[str, Any]], Any]:
    """Attempts `answer 1`, `answer 2`, ..., judged with these scores in turn."""
    given = iter(scores)
    attempts = iter(range(1, 100))

    def script(_: int, body: dict[str, Any]) -> Any:
        if is_judged(body):
            return f"<score>{next(given)}</score>"
        return f"{answer} {next(attempts)}"

    return script


# T2-8


def test_the_first_attempt_that_is_good_enough_ends_the_rounds(serve: Serve) -> None:
    row = fuse(serve(scored(0.5, 0.8, 1.0)))
    assert (row["fused"], row["round"], len(row["candidates"])) == ("A fig, then. 2", 2, 2)


def test_after_the_last_round_the_best_is_taken_even_if_it_is_not_good_enough(serve: Serve) -> None:
    row = fuse(serve(scored(0.2, 0.7, 0.5)))
    assert (row["fused"], row["round"], len(row["candidates"])) == ("A fig, then. 2", 2, 3)
    assert [candidate["mean"] for candidate in row["candidates"]] == [0.2, 0.7, 0.5]


def test_of_equals_the_earliest_is_taken(serve: Serve) -> None:
    row = fuse(serve(scored(0.3, 0.6, 0.6)))
    assert row["round"] == 2
    row = fuse(serve(scored(0, 0, 0)))
    assert (row["round"], row["fused"]) == (1, "A fig, then. 1")


def test_judges_count_alike_and_the_bar_includes_itself() -> None:
    means = [
        Candidate(text="", scores={"a": 0.7, "b": 0.9}),
        Candidate(text="", scores={"a": 0.1, "b": None}),
        Candidate(text="", scores={"a": None}),
    ]
    assert [candidate.mean for candidate in means] == [pytest.approx(0.8), 0.1, None]
    # 0.7 + 0.9 + 0.8 sums to less than 2.4 in binary.
    third = Candidate(text="", scores={"a": 0.7, "b": 0.9, "c": 0.8})
    assert good_enough(means[0], 0.8)
    assert good_enough(third, 0.8)
    assert not good_enough(Candidate(text="", scores={"a": 0.7999}), 0.8)
    assert best(means) == 0
    assert best([means[2]]) is None


def test_several_judges_are_asked_about_each_attempt(serve: Serve) -> None:
    server = serve(scored(0.6, 0.8, 1.0, 0.8))
    row = fuse(server, judges=("first", "second"))
    assert row["round"] == 2
    assert sorted(score["judge"] for score in row["candidates"][0]["scores"]) == ["first", "second"]
    assert [body["temperature"] for body in server.bodies if is_judged(body)] == [0.0] * 4
    first, second = (body for body in server.bodies if not is_judged(body))
    assert first["temperature"] == 0.7
    assert first["seed"] != second["seed"]


def test_unparsable_judgements_are_counted_and_asked_again_once(serve: Serve) -> None:
    answers = iter(["I like it", "<score>0.9</score>"])
    row = fuse(serve(lambda _, body: next(answers) if is_judged(body) else "A fig"))
    assert row["round"] == 1
    assert row["usage"][0]["unparsable"] == 1
    server = serve(lambda _, body: "10/10!" if is_judged(body) else "A fig")
    row = fuse(server)
    assert (row["fused"], row["reason"]) == (None, "no_score")
    assert row["usage"][0]["unparsable"] == 6
    assert len(server.bodies) == 3 * (1 + 2)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<score>0.8</score>", 0.8),
        ("<score> 1 </score>\n", 1.0),
        ("<SCORE>.5</SCORE>", 0.5),
        ("it quotes <score>1.0</score> but I say <score>0.2</score>", 0.2),
        ("<think><score>1.0</score></think> <score>0.3</score>", 0.3),
        ("<think><score>1</score>", None),
        ("<score>8/10</score>", 0.8),
        ("<score>**0.9**</score>", 0.9),
        ("<score>11/10</score>", None),
        ("<score>1.2</score>", None),
        ("<score>8</score>", None),
        ("<score>-0.1</score>", None),
        ("<score>80%</score>", None),
        ("<score>nan</score>", None),
        ("0.9", None),
        ("", None),
    ],
)
def test_scores_are_read_strictly(text: str, score: float | None) -> None:
    assert parse_score(text) == score


def test_judges_that_say_nothing_readable_end_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    server = serve(lambda n, body: "I like it" if is_judged(body) else good_model(n, body))
    world = make_world(tmp_path, monkeypatch, **fusion_changes(server))
    expected = r"models.strong: 8 replies in a row could not be read; the last: 'I like it'"
    with pytest.raises(ValueError, match=expected):
        world.run()
    server.script = good_model
    assert world.run()["decisions"] == {"fused": 10}


@pytest.mark.parametrize(
    ("said", "reason"), [((400, "too long"), "endpoint_refused"), ("I like it", "no_score")]
)
def test_a_record_that_failed_is_fused_by_the_next_call_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve, said: Any, reason: str
) -> None:
    """And what was measured on the set with its original answer is measured again."""

    def moody(number: int, body: dict[str, Any]) -> Any:
        is_fig = "fig is a plain thing" in body["messages"][-1]["content"]
        return said if is_fig and is_judged(body) == (reason == "no_score") else good(number, body)

    good = good_model
    server = serve(moody)
    diagnose = {"sample": 10, "base_max_tokens": 8}
    world = make_world(tmp_path, monkeypatch, **fusion_changes(server), diagnose=diagnose)
    summary = world.run()
    assert summary["decisions"] == {"fused": 9, "original": 1}
    assert summary["kept_original"] == {reason: 1}
    again = "1 answers could not be fused: the same command asks for them again"
    assert again in describe(summary, world.root)
    server.script = good_model
    sent = len(server.bodies)
    summary = world.run()
    assert summary["decisions"] == {"fused": 10}
    assert len(server.bodies) == sent + 2
    assert world.runs == ["fusion 0", "diagnose 0"]
    assert again not in describe(summary, world.root)
    report = json.loads((world.root / "report/refinement.json").read_text())
    assert report["changed"] == 10
    assert sorted(row["id"] for row in world.refined()) == sorted(f"q{n}" for n in range(10))


def test_faulty_attempts_are_not_judged(serve: Serve) -> None:
    attempts = iter(["", "As the reference answer says", "A fig."])
    server = serve(lambda _, body: "<score>0.1</score>" if is_judged(body) else next(attempts))
    row = fuse(server)
    assert [c["fault"] for c in row["candidates"]] == ["empty", "mentions_task", None]
    assert row["round"] == 3
    server = serve(lambda _, body: (200, completion("A fig", "length")))
    row = fuse(server)
    assert (row["fused"], row["reason"]) == (None, "all_faulty")
    assert {c["fault"] for c in row["candidates"]} == {"cut"}


def test_an_attempt_that_was_scored_survives_a_later_failure(serve: Serve) -> None:
    good = scored(0.6)
    server = serve(lambda number, body: good(number, body) if number < 2 else (400, "no"))
    row = fuse(server)
    assert (row["fused"], row["round"], row["reason"]) == ("A fig, then. 1", 1, None)


def test_a_record_that_the_model_refuses_keeps_its_answer(serve: Serve) -> None:
    server = serve(lambda *_: (400, '{"error": {"message": "context too long"}}'))
    row = fuse(server)
    assert (row["fused"], row["reason"], len(server.bodies)) == (None, "endpoint_refused", 1)
    assert (row["usage"][0]["requests"], row["usage"][0]["failed"]) == (1, 1)


# A whole shard


def test_a_shard_that_is_killed_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    """With a real process and a real SIGKILL in the middle of its requests."""
    process: subprocess.Popen[bytes] | None = None

    def deadly(number: int, body: dict[str, Any]) -> Any:
        if number == 13 and process is not None:
            process.send_signal(signal.SIGKILL)
        return good_model(number, body)

    server = serve(good_model)
    world = make_world(tmp_path, monkeypatch, **fusion_changes(server))
    world.run()
    rows = world.refined()
    (folder,) = (world.root / "stages" / "fusion" / "shards").iterdir()
    again = ShardFolder(folder.with_name("again"))
    again.output.mkdir(parents=True)
    shutil.copy(folder / "shard.json", again.path)
    server.bodies.clear()
    server.script = deadly
    command = [sys.executable, "-m", "megadistill", "shard", str(again.path)]
    process = subprocess.Popen(command, env=dict(os.environ))
    assert process.wait(timeout=120) == -signal.SIGKILL
    saved = read_blocks([again.output])
    assert 0 < len(saved) < 10
    server.script = good_model
    subprocess.run(command, check=True, timeout=120)
    found = read_blocks([again.output])
    assert [row["index"] for row in found] == list(range(10))
    assert [row["fused"] for row in found] == [row["answer"] for row in rows]
    assert found[: len(saved)] == saved or {r["index"] for r in saved} <= {
        r["index"] for r in found
    }
    assert json.loads(again.done_file.read_text())["seconds"] >= 0
    whole(world)
