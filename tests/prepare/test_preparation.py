"""Preparations from end to end, on small files of every kind."""

import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import GatedRepoError

from megadistill.config import PrepareConfig, load, parse
from megadistill.config.schema import FileSource, PoolConfig
from megadistill.data.pools import is_heldout
from megadistill.data.records import MEDICAL_CHOICE, MEDICAL_OPEN
from megadistill.data.sources import read_pool
from megadistill.prepare.pipeline import run_preparation

Rows = list[dict[str, Any]]
GOLD = "GOLDEN"
"""Stands in every answer, explanation and reasoning below, and in nothing else."""


def write_jsonl(file: Path, rows: Sequence[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def prepared(path: Path, name: str = "out") -> Rows:
    return [json.loads(line) for line in (path / f"{name}.jsonl").open()]


def tree_of(path: Path, files: Sequence[Path], row: dict[str, Any], **part: Any) -> dict[str, Any]:
    source = {"files": [str(file) for file in files]}
    recipe = {"parts": {"only": {"source": source, "row": row, **part}}, "prompts": "question"}
    return {"name": "out", "output_dir": str(path), "recipe": {"kind": "mixture", **recipe}}


def medmcqa(number: int) -> dict[str, Any]:
    options = {f"op{letter}": f"choice {letter} {number}" for letter in "abcd"}
    return {"id": f"m{number}", "question": unlike(number), "cop": number % 4, **options} | {
        "exp": f"{GOLD} because"
    }


def unlike(number: int) -> str:
    return " ".join(f"w{number * 31 + k}" for k in range(12))


def test_nothing_of_an_answer_is_in_a_prompt(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "middle"},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": f"{GOLD} answer"},
        {"role": "user", "content": f"thanks for {GOLD}"},
    ]
    rows: dict[str, Rows] = {
        "messages": [{"messages": turns, "reasoning": GOLD}],
        "pairs": [{"question": "why", "answer": GOLD, "reasoning": GOLD}],
        "instruction": [{"instruction": "do", "input": "this", "output": GOLD}],
        "choices": [
            {"question": "which", "options": ["a", "b"], "answer": "B", "reasoning": GOLD},
            {"question": "what", "options": "Answer Choices:\nA. a\nB. b", "answer": "b"},
            {"question": "open", "options": None, "answer": GOLD},
        ],
        "medmcqa": [medmcqa(1)],
    }
    for kind, given in rows.items():
        row = {"format": kind}
        tree = tree_of(tmp_path, [write_jsonl(tmp_path / f"{kind}.jsonl", given)], row)
        tree["recipe"]["prompts"] = "messages" if kind == "messages" else "question"
        run_preparation(parse(PrepareConfig, tree))
        for found in prepared(tmp_path):
            answer = found.pop("answer")
            assert GOLD not in json.dumps(found)
            assert answer


def test_a_mixture_draws_what_it_is_told_and_the_run_reads_it(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([medmcqa(number) for number in range(60)])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    pairs = [{"question": f"open {unlike(number)}", "answer": "yes"} for number in range(70, 99)]
    tree = tree_of(tmp_path, [tmp_path / "a.parquet"], {"format": "medmcqa", "id": "id"}, count=20)
    source = {"files": [str(write_jsonl(tmp_path / "b.jsonl", pairs))], "licence": "MIT"}
    tree["recipe"]["parts"]["open"] = {"source": source, "row": {"format": "pairs"}, "count": 5}
    text = run_preparation(parse(PrepareConfig, tree))
    rows = prepared(tmp_path)
    assert [row["part"] for row in rows] == ["only"] * 20 + ["open"] * 5
    assert all((row["split"] == "heldout") == is_heldout(row["id"], 0.02) for row in rows)
    assert "| open | files | MIT | 1 |" in text
    card = json.loads((tmp_path / "out.card.json").read_text())
    assert card["parts"]["open"]["kept"] == 5
    again = tmp_path / "again"
    run_preparation(parse(PrepareConfig, tree | {"output_dir": str(again)}))
    assert (again / "out.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    pool = PoolConfig(
        template="medical",
        sources=[
            FileSource(path=str(tmp_path / "out.jsonl"), prompt="question", options="options")
        ],
    )
    records = list(read_pool(pool))
    assert records[0].messages[1]["content"].endswith(MEDICAL_CHOICE)
    assert "\nD. choice d" in records[0].messages[1]["content"]
    assert records[-1].messages[1]["content"].endswith(MEDICAL_OPEN)


def test_dropped_rows_are_replaced_by_others_that_were_not_drawn_at_first(tmp_path: Path) -> None:
    rows = [{"question": unlike(n % 40), "answer": "yes"} for n in range(400)]
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    run_preparation(parse(PrepareConfig, tree_of(tmp_path, [file], {"format": "pairs"}, count=40)))
    assert len({row["question"] for row in prepared(tmp_path)}) == 40
    with pytest.raises(ValueError, match="found 40 usable records among 400 rows, expected 41"):
        run_preparation(
            parse(PrepareConfig, tree_of(tmp_path, [file], {"format": "pairs"}, count=41))
        )
    assert len(prepared(tmp_path)) == 40


def test_items_of_a_benchmark_are_left_out(tmp_path: Path) -> None:
    item = {"question": unlike(3), "options": {"A": "x", "B": "y"}, "answer_idx": "A"}
    short = {"question": "Why?", "options": {"A": "x", "B": "y"}, "answer_idx": "A"}
    benchmark = write_jsonl(tmp_path / "medqa.jsonl", [item, short, short])
    rows = [{"question": f"so: {unlike(n)} x y?", "answer": "x"} for n in range(8)]
    tree = tree_of(tmp_path, [write_jsonl(tmp_path / "in.jsonl", rows)], {"format": "pairs"})
    tree["contamination"] = {"benchmarks": {"medqa": str(benchmark)}}
    text = run_preparation(parse(PrepareConfig, tree))
    assert "medqa 1" in text
    assert text.endswith("\n| medqa | 1 | 2 |\n")
    card = json.loads((tmp_path / "out.card.json").read_text())
    assert card["benchmarks"] == {"medqa": {"looked_for": 1, "too_short": 2}}
    assert len(prepared(tmp_path)) == 7


def test_the_longest_conversations_are_prompts_without_their_last_turn(tmp_path: Path) -> None:
    def chat(number: int) -> dict[str, Any]:
        turns = [{"from": "system", "value": f"you are {number}"}]
        for turn in range(number + 1):
            turns.append({"from": "human", "value": f"{unlike(100 * number + turn)}"})
            turns.append({"from": "gpt", "value": f"{GOLD} {number} {turn}"})
        return {"conversations": [*turns, {"from": "human", "value": "left open"}]}

    file = tmp_path / "in.json"
    file.write_text(json.dumps([chat(number) for number in range(6)]))
    source = {"files": [str(file)]}
    recipe = {"kind": "conversations", "source": source, "reserve": 2}
    tree = {"name": "out", "sft_name": "sft", "output_dir": str(tmp_path), "recipe": recipe}
    run_preparation(parse(PrepareConfig, tree))
    prompts, sft = prepared(tmp_path), prepared(tmp_path, "sft")
    assert [len(row["messages"]) for row in prompts] == [10, 12]
    assert [row["messages"][-1]["role"] for row in prompts] == ["user", "user"]
    assert [row["answer"] for row in sft] == [f"{GOLD} {n} {n}" for n in range(4)]
    run_preparation(parse(PrepareConfig, tree | {"recipe": recipe | {"sft_turns": "all"}}))
    assert len(prepared(tmp_path, "sft")) == 1 + 2 + 3 + 4


BAD_ROWS: dict[str, tuple[bytes, str]] = {
    "missing field": (b'{"question": "q", "options": ["a", "b"]}', "row 2 has no field 'answer'"),
    "letters": (
        b'{"question": "q", "options": {"A": "a", "C": "c"}, "answer": "A"}',
        "row 2 has options with the letters 'AC'",
    ),
    "answer": (
        b'{"question": "q", "options": ["a", "b"], "answer": "E"}',
        "row 2 has the answer 'E', which is none of the options A, B",
    ),
    "id": (
        b'{"id": "one", "question": "q", "options": ["a", "b"], "answer": "A"}',
        "row 2: its id 'only-one' is also that of",
    ),
    "utf-8": (b'{"id": "two", "question": "\xff"}', "row 2 is not UTF-8"),
    "surrogate": (
        b'{"id": "t", "question": "\\ud800", "options": ["a", "b"], "answer": "A"}',
        "row 2 holds half a character",
    ),
    "json": (b'{"id": "two", "question', "row 2 is not JSON"),
    "list": (b'["two"]', "row 2 is a list, expected an object"),
    "long": (b'{"id": "' + b"x" * (1 << 20) + b'"}', "row 2 is longer than 1 MiB"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    bad, message = BAD_ROWS[name]
    good = b'{"id": "one", "question": "q", "options": ["a", "b"], "answer": "A"}'
    (tmp_path / "in.jsonl").write_bytes(good + b"\n" + bad + b"\n")
    row = {"format": "choices", "id": "id" if b'"id"' in bad else None}
    tree = tree_of(tmp_path / "out", [tmp_path / "in.jsonl"], row) | {"max_line_mib": 1}
    with pytest.raises(ValueError, match="row 2") as error:
        run_preparation(parse(PrepareConfig, tree))
    assert message in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_csv_row_that_is_too_long_is_named(tmp_path: Path) -> None:
    long = "x" * (3 << 20)
    (tmp_path / "in.csv").write_text(f"question,answer\nwhy is it so,a\n{long},b\n")
    tree = tree_of(tmp_path / "out", [tmp_path / "in.csv"], {"format": "pairs"})
    with pytest.raises(ValueError, match=r"row 2 is longer than 1 MiB \(max_line_mib\)"):
        run_preparation(parse(PrepareConfig, tree | {"max_line_mib": 1}))
    run_preparation(parse(PrepareConfig, tree | {"max_line_mib": 4}))
    assert len(prepared(tmp_path / "out")) == 2


def test_a_few_unusable_rows_may_be_left_out_where_the_user_says_so(tmp_path: Path) -> None:
    rows = [{"question": "why is this so"}, {"question": "what is that for", "answer": "a"}]
    tree = tree_of(tmp_path, [write_jsonl(tmp_path / "in.jsonl", rows)], {"format": "pairs"})
    run_preparation(parse(PrepareConfig, tree | {"unusable": 1}))
    assert [row["answer"] for row in prepared(tmp_path)] == ["a"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", [{"question": "why is it", "answer": "a"}])
    config = parse(PrepareConfig, tree_of(tmp_path / "out", [file], {"format": "pairs"}))
    run_preparation(config)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (16, hard)
    )  # a real write that fails, as on a full disk
    try:
        with pytest.raises(ValueError, match=r"/out: File too large"):
            run_preparation(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_what_is_not_in_the_cache_is_to_be_downloaded(tmp_path: Path) -> None:
    config = load(
        PrepareConfig,
        Path(__file__).parents[2] / "configs/prepare/nemotron_10k.yaml",
        ["contamination=null", f"output_dir={tmp_path}"],
    )
    with pytest.raises(ValueError, match="--download-only"):
        run_preparation(config)


def test_the_shipped_recipes_make_the_files_that_shipped_runs_read() -> None:
    configs = Path(__file__).parents[2] / "configs"
    made = set()
    for file in (configs / "prepare").glob("*.yaml"):
        config = load(PrepareConfig, file)
        made |= {config.name, config.sft_name}
    assert {"nemotron_10k", "medical_10k", "coser_prompts_10k", "coser_sft"} <= made


SHIPPED_ROWS: dict[str, dict[str, Rows]] = {
    "raft_qa": {
        "medquad": [
            {"qtype": "treatment", "Question": "How is it treated?", "Answer": "With rest."},
            {"qtype": "causes", "Question": "What causes it?", "Answer": None},
        ]
    },
    "medical_small": {
        "medmcqa": [medmcqa(1)],
        "medqa": [
            {
                "question": "A man of 40 coughs. Which is it?",
                "answer": "Flu",
                "options": {"A": "Flu", "B": "Gout"},
                "meta_info": "step1",
                "answer_idx": "A",
            }
        ],
    },
}
"""One row or two as the hub's files have them."""


@pytest.mark.parametrize("name", SHIPPED_ROWS)
def test_a_shipped_recipe_reads_rows_as_the_hub_has_them(name: str, tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "configs" / "prepare" / f"{name}.yaml"
    overrides = [f"output_dir={tmp_path}"]
    for part, rows in SHIPPED_ROWS[name].items():
        file = write_jsonl(tmp_path / f"{part}_rows.jsonl", rows)
        overrides.append(f"recipe.parts.{part}.source={{files: ['{file}']}}")
        if name == "medical_small":
            overrides.append(f"recipe.parts.{part}.count=1")
    run_preparation(load(PrepareConfig, recipe, overrides))
    made = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert [row["part"] for row in made] == list(SHIPPED_ROWS[name])
    assert all(row["question"] and row["answer"] for row in made)
    assert all(bool(row.get("options")) == (name == "medical_small") for row in made)


class HiddenError(GatedRepoError):
    def __init__(self) -> None:
        Exception.__init__(self, "403")


def test_the_hubs_files_are_read_from_its_cache_at_their_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot(name: str, **settings: Any) -> str:
        asked.append((name, settings["revision"], settings["allow_patterns"][:1]))
        write_jsonl(tmp_path / "snapshot" / "data" / "a.jsonl", [{"question": "why is it"}])
        return str(tmp_path / "snapshot")

    tree = tree_of(tmp_path, [], {"format": "pairs"})
    source = {"hub": "org/name", "revision": "v1", "files": ["data/*.jsonl"]}
    tree["recipe"]["parts"]["only"]["source"] = source
    config = parse(PrepareConfig, tree)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert run_preparation(config, download_only=True).endswith("data/a.jsonl")
    assert asked == [("org/name", "v1", ["data/*.jsonl"])]
    with pytest.raises(ValueError, match=r"a\.jsonl: row 1 has no field 'answer'"):
        run_preparation(config)

    def gated(name: str, **_: Any) -> None:
        raise HiddenError

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(ValueError, match="accept its terms on"):
        run_preparation(config, download_only=True)


def test_nodes_without_network_read_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / "datasets--org--name"
    write_jsonl(folder / "snapshots" / ("a" * 40) / "data" / "a.jsonl", [medmcqa(1)])
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    tree = tree_of(tmp_path, [], {"format": "medmcqa"})
    tree["recipe"]["parts"]["only"]["source"] = {"hub": "org/name", "files": ["data/*.jsonl"]}
    run_preparation(parse(PrepareConfig, tree))
    assert [row["id"] for row in prepared(tmp_path)] == ["only-a-1"]
    tree["recipe"]["parts"]["only"]["source"]["files"] = ["other/*.jsonl"]
    with pytest.raises(ValueError, match=r"other/\*.jsonl', where no data file is .*download-only"):
        run_preparation(parse(PrepareConfig, tree))


def test_the_mirror_of_an_old_configuration_is_left_alone_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", [{"question": "why is it", "answer": "a"}])
    tree = tree_of(tmp_path, [file], {"format": "pairs"}) | {"mirror": "./data/mirror"}
    run_preparation(parse(PrepareConfig, tree))
    assert "mirror: found './data/mirror', which is not read any more" in caplog.text


def test_unusable_rows_are_counted_by_their_reason(tmp_path: Path) -> None:
    calls = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{}]}]
    rows: Rows = [
        {"messages": [{"role": "judge", "content": "x"}]},
        {"messages": calls},
        {"messages": None},
        {"messages": [{"role": "system", "content": " "}, *calls[:1]]},
    ]
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    tree = tree_of(tmp_path, [file], {"format": "messages"}) | {"unusable": 2, "duplicates": None}
    tree["recipe"]["prompts"] = "messages"
    run_preparation(parse(PrepareConfig, tree))
    assert [(row["messages"], row["answer"]) for row in prepared(tmp_path)] == [
        ([{"role": "user", "content": "a"}], None)
    ] * 2
    card = json.loads((tmp_path / "out.card.json").read_text())["parts"]["only"]
    assert card["unusable"] == 2
    assert card["unusable_by_reason"] == {"bad_messages": 1, "missing_fields": 1}
