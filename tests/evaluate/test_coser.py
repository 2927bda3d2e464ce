"""CoSER's scenes: who sees what, turn by turn, and judged, with scripted endpoints over real HTTP."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megadistill.config import EvaluateConfig, parse
from megadistill.evaluate import coser_gca
from megadistill.evaluate.benchmarks import coser, read_items
from megadistill.evaluate.coser_gca import Line
from megadistill.evaluate.requirements import check
from tests.evaluate.test_evaluation import World
from tests.inference.scripted import Endpoint, endpoint_tree


def scene_row(number: int = 0) -> dict[str, Any]:
    return {
        "book": "Fables",
        "scenario": "A clearing at dusk.",
        "key_characters": [{"name": "Fox", "motivation": "Fox wants the cheese."}],
        "dialogues": [
            {"character": "Fox", "message": "[I am hungry.] Sing for me."},
            {"character": "Crow", "message": "(drops the cheese) Caw."},
        ],
        "speaking_characters_w_env": ["Fox", "Crow"],
        "major_characters": ["Fox", "Crow"],
        "plot": {
            "summary": "A fox flatters a crow.",
            "i_p": 3,
            "key_characters": [{"name": "Fox", "description": "A flatterer."}],
        },
        "character_profiles": {"Fox": "Sly.", "Crow": "Vain."},
        "i_c": number,
        "tag": "id",
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "test_set.json"
    path.write_text(json.dumps([scene_row(0), scene_row(1)], indent=1))
    return path


def act(number: int, body: dict[str, Any]) -> str:
    """The system: says who it is, with a thought; its first reply of a scene is all thinking."""
    system = body["messages"][0]["content"]
    name = system.removeprefix("You are ").partition(" from ")[0]
    if name == "Crow" and body["temperature"] == 0.0:
        return "<think>hm</think>"
    return f"[{name} keeps a secret] (nods) I am {name}."


def direct(number: int, body: dict[str, Any]) -> str:
    """The judge's model: next speaker, world, and a critic with one flaw of severity 3."""
    system = body["messages"][0]["content"]
    if "takes the next turn" in system:
        turns = body["messages"][-1]["content"].count("\n\n") + 1
        if turns >= 7:
            return "Enough.\nNext speaker: <END CHAT>"
        spoke = body["messages"][-1]["content"].rpartition("\n\n")[2].partition(":")[0]
        following = {"Fox": "Crow", "Crow": "Environment", "Environment": "Fox"}[spoke]
        return f"It is their turn.\n**Next speaker:** {following}"
    if "You are the world" in system:
        return "Wind in the leaves."
    return '[{"instance": "x", "type": "y", "severity": 3}]'


@pytest.fixture
def endpoints() -> Iterator[dict[str, Endpoint]]:
    started = {"actor": Endpoint(act), "director": Endpoint(direct)}
    yield started
    for endpoint in started.values():
        endpoint.stop()


def evaluate(tmp_path: Path, file: Path, endpoints: dict[str, Endpoint]) -> World:
    tree = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "device": "cpu",
        "systems": {"actor": endpoint_tree(endpoints["actor"].url)},
        "models": {"critic": endpoint_tree(endpoints["director"].url)},
        "benchmarks": {"coser": {"path": str(file), "judge": "critic"}},
    }
    return World(tmp_path, {}, tree)


def test_scenes_are_played_judged_and_stored(
    tmp_path: Path, file: Path, endpoints: dict[str, Endpoint]
) -> None:
    world = evaluate(tmp_path, file, endpoints)
    # Six turns, four of them by actors: 100 - 5 (3 - 0.3 x 4) in each dimension.
    assert "CoSER GCA (part) (n=2)" in (table := world.run())
    assert "91.0" in table
    rows = world.results("actor", "coser")
    assert [row["item"] for row in rows] == ["Fables-3-0", "Fables-3-1"]
    scene = coser.lines_of(rows[0]["written"])
    assert [line.speaker for line in scene] == ["Fox", "Crow", "Environment"] * 2
    assert json.loads(rows[0]["details"]) == {
        **dict.fromkeys(coser_gca.DIMENSIONS, 91.0),
        "turns": 6,
    }
    assert len(json.loads(rows[0]["replies"])) == 4
    asked = [body["messages"] for body in endpoints["actor"].bodies]
    crow = next(m for m in asked if m[0]["content"].startswith("You are Crow from Fables."))
    assert "Fox: (nods) I am Fox." in crow[-1]["content"]
    assert "Fox keeps a secret" not in json.dumps(crow)
    assert "Fox wants the cheese" not in crow[0]["content"]
    assert "A flatterer.\n\nSly." in crow[0]["content"]
    again = next(m for m in asked if m[0] == crow[0] and len(m) > 2)
    assert "[Crow keeps a secret]" in again[2]["content"]  # its own thoughts are before it
    judged = [
        b for b in endpoints["director"].bodies if "You are a critic" in str(b["messages"][0])
    ]
    assert {"secret" in str(body["messages"]) for body in judged} == {False}
    assert "Fox: Sing for me." in judged[0]["messages"][0]["content"]
    assert len({body["messages"][0]["content"] for body in judged}) == 4
    world.run()
    assert world.runs == []


def test_another_director_plays_the_scenes_again_and_a_scene_that_breaks_off_has_no_score(
    tmp_path: Path, file: Path, endpoints: dict[str, Endpoint]
) -> None:
    world = evaluate(tmp_path, file, endpoints)
    world.run()
    critic = world.tree["models"]["critic"]
    world.run(models={"critic": critic | {"model": "other"}})
    assert world.runs == ["generate actor coser", "score actor coser"]
    endpoints["actor"].script = lambda number, body: (400, "too long")
    system = {"actor": world.tree["systems"]["actor"] | {"model": "another"}}
    chosen = world.tree["benchmarks"]["coser"] | {"limit": 1}
    table = world.run(systems=system, benchmarks={"coser": chosen})
    (row,) = world.results("actor", "coser")
    assert (row["weight"], row["finish_reason"]) == (0.0, "endpoint_refused")
    assert "| actor | no score, 1 of 1 answers have none: 1 endpoint refused |" in table


def test_a_verdict_that_cannot_be_read_takes_the_scene_out(file: Path) -> None:
    (item, _) = read_items("coser", str(file))
    scene = json.dumps([["Fox", "Sing."], ["Environment", "Wind."]])
    found = coser.score_replies(item, scene, ["[]", "[]", "no idea", "[]"])
    assert (found.weight, dict(found.details)) == (0.0, {})
    assert coser.score_replies(item, scene, ["[]"] * 4).value == 1.0


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Ben", "Ben"),
        ("Reasoning: Ada asked.\nNext Speaker: Ben", "Ben"),
        ("**Next Speaker**: *Ben*.", "Ben"),
        ("2. Next Speaker: Ada\nno,\nnext speaker is Ben", "Ben"),
        ("It is over.\nNext Speaker: <END CHAT>", coser_gca.END),
        ("<END CHAT> would be too early.\nNext Speaker: Ben", "Ben"),
        ("random", "random"),
    ],
)
def test_the_predictors_reply_names_somebody(reply: str, expected: str) -> None:
    assert coser_gca.named(reply) == expected


def test_the_chat_of_a_character_alternates() -> None:
    start = ({"role": "system", "content": "s"}, {"role": "user", "content": "go"})
    lines = [Line(speaker=who, text=f"[x] {who}") for who in ("A", "B", "B", "C", "A")]
    chat = coser.seen_by("B", start, lines)
    assert [turn["role"] for turn in chat] == ["system", "user", "assistant", "user"]
    assert [turn["content"] for turn in chat[1:]] == [
        "go\n\nA: A",
        "[x] B\n\n[x] B",
        "C: C\n\nA: A",
    ]


def test_without_a_director_nothing_begins(tmp_path: Path, file: Path) -> None:
    tree = {
        "name": "t",
        "runs_dir": str(tmp_path),
        "systems": {"a": endpoint_tree("http://localhost:1/v1")},
        "benchmarks": {"coser": {"path": str(file)}},
    }
    with pytest.raises(ValueError, match="CoSER GCA needs a judge"):
        check(parse(EvaluateConfig, tree))


def test_a_row_that_is_no_scene_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps([{**scene_row(), "dialogues": []}]))
    with pytest.raises(ValueError, match="row 1: has no speakers or no dialogue"):
        list(read_items("coser", str(tmp_path / "x.json")))
