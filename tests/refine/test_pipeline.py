"""A refinement from its input to its result, killed, repeated and changed on the way."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from megadistill.cli import main
from megadistill.config import RefineConfig, load
from megadistill.config.schema import FileSource, PoolConfig
from megadistill.data.sources import read_pool
from megadistill.refine.assembly import describe
from megadistill.refine.pipeline import run_refinement
from tests.inference.scripted import Endpoint, Killed, endpoint_tree
from tests.launch.in_process import shards_in_process
from tests.refine.world import PAIRS, WordEncoder, World, is_judged, make_world
from tests.tiny import set_today


def good_model(_: int, body: dict[str, Any]) -> str:
    """Fuses to the answer with `truly` before it, judges everything 0.9."""
    if is_judged(body):
        return "fine <score>0.9</score>"
    text: str = body["messages"][-1]["content"]
    return "truly " + text.partition("<answer_a>\n")[2].partition("\n</answer_a>")[0]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint(good_model)
    yield server
    server.stop()


def fusion_changes(endpoint: Endpoint, **changes: Any) -> dict[str, Any]:
    return {
        "models": {"strong": endpoint_tree(endpoint.url, price_prompt=2.0, concurrency=2)},
        "fusion": {"model": "strong", "judges": ["strong"], **changes},
    }


def whole(world: World) -> list[str]:
    """The ids of the refined set, after checking that each input came out once."""
    ids = [row["id"] for row in world.refined()]
    assert ids == [pair["id"] for pair in PAIRS]
    return ids


def test_rewrites_that_pass_become_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path, monkeypatch)
    summary = world.run()
    whole(world)
    first = world.refined()[0]
    assert first["answer"] == "indeed apple is a plain thing"
    assert first["original"] == "apple is a plain thing"
    assert first["messages"] == [{"role": "user", "content": "what is apple ?"}]
    assert summary["decisions"] == {"rewrite": 10}
    assert summary["similarity"]["pass_rate"] == 1.0
    assert sum(summary["similarity"]["histogram"]["counts"]) == 10
    for name in ("refined", "provenance"):
        file = world.root / f"{name}.parquet"
        made = Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
        assert made.to_list() == pq.read_table(file).to_pylist()
    assert pq.read_table(world.root / "refined.parquet").to_pylist() == world.refined()


def test_the_refined_set_is_a_training_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path, monkeypatch)
    world.run()
    for name in ("refined.jsonl", "refined.parquet"):
        for answer in ("answer", "original", "rewrite", "filtered"):
            source = FileSource(path=str(world.root / name), prompt="messages", answer=answer)
            records = list(read_pool(PoolConfig(sources=[source])))
            assert [record.id for record in records] == whole(world)
            expected = (
                PAIRS[0]["answer"] if answer == "original" else f"indeed {PAIRS[0]['answer']}"
            )
            assert records[0].answer == expected


def test_fused_answers_carry_their_provenance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint
) -> None:
    world = make_world(tmp_path, monkeypatch, **fusion_changes(endpoint))
    summary = world.run()
    whole(world)
    assert world.refined()[3]["answer"] == "truly damson is a plain thing"
    (row,) = [
        row
        for row in pq.read_table(world.root / "provenance.parquet").to_pylist()
        if row["id"] == "q3"
    ]
    assert row["rewrite"] == "indeed damson is a plain thing"
    assert row["round"] == 1
    assert row["decision"] == "fused"
    assert row["candidates"][0]["scores"] == [{"judge": "strong", "score": 0.9}]
    hashes = json.loads(row["hashes"])
    assert hashes["rewrite"].keys() == {"model", "template"}
    assert hashes["filter"].keys() == {"encoder"}
    assert hashes["fusion"]["models"]["strong"]["model"] == "m"
    assert len(hashes["fusion"]["templates"]) == 2
    used = summary["models"]["strong"]
    assert (used["requests"], used["prompt_tokens"], used["completion_tokens"]) == (20, 200, 100)
    assert used["cost"] == pytest.approx(200 * 2e-6)
    assert endpoint.most_busy <= 2
    assert "10 fused" in describe(summary, world.root)


def test_a_repeated_run_computes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint
) -> None:
    world = make_world(tmp_path, monkeypatch, **fusion_changes(endpoint))
    world.run()
    before = world.refined(), len(world.engine.prompts), len(endpoint.bodies)
    world.run(engine={"max_num_seqs": 7})
    assert world.runs == []
    assert (world.refined(), len(world.engine.prompts), len(endpoint.bodies)) == before


@pytest.mark.parametrize(
    ("changes", "repeated"),
    [
        ({"rewrite": {"temperature": 0.5}}, {"rewrite", "filter", "fusion"}),
        ({"filter": {"window": 4}}, {"filter", "fusion"}),
        ({"filter": {"tau": 0.5}}, {"fusion"}),
        ({"fusion": {"rounds": 2}}, {"fusion"}),
        ({"filter": {"batch_size": 3}}, set()),
    ],
)
def test_a_changed_stage_recomputes_only_from_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    endpoint: Endpoint,
    changes: dict[str, Any],
    repeated: set[str],
) -> None:
    world = make_world(tmp_path, monkeypatch, **fusion_changes(endpoint))
    world.run()
    world.run(**{name: {**world.tree.get(name, {}), **values} for name, values in changes.items()})
    assert {label.split()[0] for label in world.runs} == repeated
    whole(world)


def test_other_sizes_and_one_more_row_repeat_nothing_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint
) -> None:
    world = make_world(tmp_path, monkeypatch, **fusion_changes(endpoint))
    world.run()
    before = world.refined(), len(world.engine.prompts), len(endpoint.bodies)
    for shards in ({"count": 2, "block": 3}, {"count": 3, "block": 2, "fusion": 2}):
        world.run(shards=shards)
        assert {label.split()[0] for label in world.runs} == {"rewrite", "filter", "fusion"}
        assert (world.refined(), len(world.engine.prompts), len(endpoint.bodies)) == before
    file = tmp_path / "input.jsonl"
    new = {"id": "new", "question": "what is fig ?", "answer": "fig is a plain thing"}
    file.write_text(json.dumps(new) + "\n" + file.read_text())
    world.run()
    assert [row["id"] for row in world.refined()] == ["new", *(pair["id"] for pair in PAIRS)]
    assert world.refined()[1:] == before[0]
    assert len(world.engine.prompts) == before[1] + 1
    assert len(endpoint.bodies) == before[2] + 2
    world.run(rewrite={**world.tree["rewrite"], "temperature": 0.1})
    assert len(world.engine.prompts) == before[1] + 1 + 11


def test_changed_templates_and_inputs_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint
) -> None:
    template = tmp_path / "fuse.txt"
    template.write_text("=== user ===\n{question}<answer_a>\n{answer}\n</answer_a> {rewrite}")
    world = make_world(tmp_path, monkeypatch, **fusion_changes(endpoint, template=str(template)))
    world.run()
    template.write_text("=== user ===\nAnew: {question}<answer_a>\n{answer}\n</answer_a> {rewrite}")
    world.run()
    assert {label.split()[0] for label in world.runs} == {"fusion"}
    assert sum(b["messages"][-1]["content"].startswith("Anew") for b in endpoint.bodies) == 10
    (tmp_path / "input.jsonl").open("a").write(
        '{"id": "new", "question": "what is fig ?", "answer": "fig is a plain thing"}\n'
    )
    world.run()
    assert {label.split()[0] for label in world.runs} == {"rewrite", "filter", "fusion"}
    assert len(world.refined()) == 11


def test_killed_rewriting_goes_on_without_repeating_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path, monkeypatch, shards={"count": 1, "block": 3})
    world.engine.kill_at = 7
    with pytest.raises(Killed):
        world.run()
    world.engine.kill_at = None
    world.run()
    whole(world)
    # Six of the seven were saved in two blocks; the seventh is asked for again.
    assert len(world.engine.prompts) == 7 + 4
    assert not list(world.root.rglob("*.tmp"))


def test_a_killed_filter_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path, monkeypatch)
    monkeypatch.setattr(WordEncoder, "kill_at", 6)
    with pytest.raises(Killed):
        world.run()
    assert list(world.root.glob("stages/filter/shards/*/output/block-000000.parquet"))
    monkeypatch.setattr(WordEncoder, "kill_at", None)
    world.run()
    assert {label.split()[0] for label in world.runs} == {"filter"}
    whole(world)


def test_a_refinement_keeps_the_day_on_which_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path, monkeypatch)
    for day in ("2026-03-01", "2026-03-02"):
        set_today(monkeypatch, day)
        world.runs.clear()
        with shards_in_process(world.runs):
            run_refinement(world.config())
    assert not world.runs
    assert "date: '2026-03-01'" in (world.root / "config.yaml").read_text()


def test_killed_fusion_goes_on_and_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint
) -> None:
    world = make_world(tmp_path, monkeypatch, **fusion_changes(endpoint))

    def broken(number: int, body: dict[str, Any]) -> Any:
        return good_model(number, body) if number < 12 else (401, "{}")

    endpoint.script = broken
    with pytest.raises(ValueError, match=r"models.strong: the endpoint answered 401"):
        world.run()
    saved = len(list(world.root.glob("stages/fusion/shards/*/output/block-*.parquet")))
    assert 0 < saved < 5
    endpoint.script = good_model
    sent = len(endpoint.bodies)
    summary = world.run()
    whole(world)
    assert len(endpoint.bodies) - sent == 2 * 2 * (5 - saved)
    assert summary["decisions"] == {"fused": 10}


def test_killed_diagnostics_do_not_ask_the_model_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path, monkeypatch, diagnose={"sample": 6, "examples": 2})
    world.run(diagnose=None)
    monkeypatch.setattr(WordEncoder, "kill_at", 0)
    with pytest.raises(Killed):
        world.run()
    asked = len(world.engine.prompts)
    assert asked == 10 + 6
    monkeypatch.setattr(WordEncoder, "kill_at", None)
    world.run()
    assert world.runs == ["diagnose 0"]
    assert len(world.engine.prompts) == asked
    values = json.loads((world.root / "report" / "refinement.json").read_text())
    assert (values["records"], values["changed"]) == (6, 6)
    names = {file.name for file in (world.root / "report").iterdir()}
    assert names == {f"refinement.{kind}" for kind in ("json", "txt", "png", "html")}


POISON: list[Any] = [
    {"id": "ok", "question": "what is fig ?", "answer": "fig is a plain thing"},
    {"id": "long", "question": "what is fig ?", "answer": "a" * 200_000},
    {"id": "wordy", "question": "what is fig ?", "answer": "fig " * 400},
    {"id": "nul", "question": "what is \x00 fig ?", "answer": "fig is \x1b[31m red"},
    {"id": "special", "question": "what is fig ?", "answer": "x <|end|> <|assistant|> y"},
    {"id": "braces", "question": "{answer} {0} %s ?", "answer": "{question} is {rewrite} {{"},
    {"id": "empty", "question": "what is fig ?", "answer": "  \n"},
    {"id": "mute", "question": "", "answer": "fig"},
    '{"id": "surrogate", "question": "what is \\ud800 ?", "answer": "fig"}',
    "not json at all",
    "[" * 100_000,
    "[1, 2]",
    {"id": "fields", "text": "fig"},
    {"id": "typed", "question": ["what"], "answer": "fig"},
    {"id": "ok", "question": "what is fig ?", "answer": "fig is a plain thing"},
    {"id": "ok", "question": "what is jam ?", "answer": "jam is a plain thing"},
    {"id": 7, "question": "what is 7 ?", "answer": 7},
]


def test_poisoned_records_are_kept_or_rejected_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path, monkeypatch, rows=POISON)
    summary = world.run()
    rows = {row["id"]: row for row in world.refined()}
    assert list(rows) == ["ok", "long", "wordy", "nul", "special", "braces", "ok~16", "7"]
    assert summary["rejected"] == {
        "empty_answer": 1,
        "empty_question": 1,
        "not_unicode": 1,
        "not_json": 2,
        "not_an_object": 1,
        "missing_fields": 1,
        "not_text": 1,
        "duplicate": 1,
    }
    assert summary["rows_read"] == len(POISON) == len(rows) + 9
    assert summary["kept_original"] == {
        "too_long": 1,
        "prompt_too_long": 1,
        "control_characters": 1,
        "special_tokens": 1,
        "below_tau": 1,
    }
    for name in ("long", "wordy", "nul", "special"):
        assert rows[name]["answer"] == rows[name]["original"]
    assert rows["nul"]["question"] == "what is \x00 fig ?"
    assert "{question} is {rewrite} {{" in rows["braces"]["answer"]
    assert Counter(row["decision"] for row in rows.values()) == {"rewrite": 3, "original": 5}
    rejected = (world.root / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in rejected] == [7, 8, 9, 10, 11, 12, 13, 14, 15]


def test_mistakes_are_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path, monkeypatch)
    rewrite = world.tree["rewrite"]
    with pytest.raises(
        ValueError, match=r"template: found 'packaged:absent', .*one of .*rewrite-v1"
    ):
        world.run(rewrite={**rewrite, "template": "packaged:absent"})
    with pytest.raises(ValueError, match=r"input.path: found '/absent.jsonl'"):
        world.run(input={"path": "/absent.jsonl"})
    with pytest.raises(ValueError, match=r"the package no-such-encoder is not installed"):
        world.run(filter={"encoder": "packaged:no-such-encoder"})
    with pytest.raises(ValueError, match=r"fusion.model: found 'gone', expected one of \[\]"):
        world.config(fusion={"model": "gone", "judges": ["gone"]})
    assert not world.root.exists()


def test_the_command_line_knows_refinements(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(__file__).parents[2] / "configs" / "refine" / "raft_served.yaml"
    shown = tmp_path / "shown.yaml"
    for words in (["config", "show", str(file), "seed=5"], ["config", "check", str(shown)]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        if words[1] == "show":
            shown.write_text(capsys.readouterr().out)
    assert load(RefineConfig, shown).seed == 5
    with pytest.raises(SystemExit) as ended:
        main(["refine", str(file), "filter.tau=2"])
    assert ended.value.code == 2
    assert "filter.tau" in capsys.readouterr().err
