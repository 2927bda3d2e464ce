"""Prompts from packaged sets, files and procedural tasks; bad rows are named."""

import json
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, DatasetDict

from megadistill.config.rows import Message, RowConfig
from megadistill.config.schema import (
    DatasetSource,
    FileSource,
    PackagedSource,
    PoolConfig,
    ReasoningGymSource,
    Source,
)
from megadistill.data.files import count_rows, read_rows
from megadistill.data.records import Record
from megadistill.data.sources import check_pool, read_pool


def medical_messages(question: str, options: dict[str, str] | None) -> tuple[Message, ...]:
    return Record(id="x", prompt=question, options=options).medical_messages


def read(*sources: Source, medical: bool = False) -> list[Record]:
    template = "medical" if medical else "plain"
    return list(read_pool(PoolConfig(sources=list(sources), template=template)))  # type: ignore[arg-type]


def write_rows(file: Path, *rows: Any) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def packaged_rows(name: str) -> list[dict[str, Any]]:
    text = (resources.files("megadistill.data") / "sets" / name).read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_medical_set_is_whole_and_well_formed() -> None:
    rows = packaged_rows("medical_questions.jsonl")
    assert len(rows) == 320
    for row in rows:
        assert set(row) == {"id", "topic", "question", "options", "answer", "explanation"}
        assert list(row["options"]) == ["A", "B", "C", "D"], row["id"]
        assert len({text.casefold() for text in row["options"].values()}) == 4, row["id"]
        assert row["answer"] in row["options"], row["id"]
        for text in (row["question"], row["explanation"], *row["options"].values()):
            assert text == text.strip() != "", row["id"]


def test_medical_questions_differ_and_their_answers_are_balanced() -> None:
    rows = packaged_rows("medical_questions.jsonl")
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["question"].casefold() for row in rows}) == len(rows)
    counts = Counter(row["answer"] for row in rows)
    assert max(counts.values()) - min(counts.values()) <= len(rows) * 0.05
    assert len({row["topic"] for row in rows}) >= 10


def test_the_general_set_is_whole_varied_and_without_duplicates() -> None:
    rows = packaged_rows("general_prompts.jsonl")
    assert len(rows) == 320
    assert all(set(row) == {"id", "category", "prompt"} for row in rows)
    assert all(row["prompt"] == row["prompt"].strip() != "" for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["prompt"].casefold() for row in rows}) == len(rows)
    assert len({row["category"] for row in rows}) >= 10


def test_packaged_medical_records_answer_with_explanation_and_letter() -> None:
    rows = packaged_rows("medical_questions.jsonl")
    records = read(PackagedSource(name="medical"), medical=True)
    for row, record in zip(rows, records, strict=True):
        letter = row["answer"]
        assert record.id == row["id"]
        assert record.answer is not None
        assert record.answer.startswith(row["explanation"])
        assert record.answer.endswith(f"Final answer: {letter}. {row['options'][letter]}")


def test_no_packaged_prompt_shows_its_answer() -> None:
    rows = packaged_rows("medical_questions.jsonl")
    for row, record in zip(rows, read(PackagedSource(name="medical"), medical=True), strict=True):
        shown = " ".join(message["content"] for message in record.messages)
        assert row["question"] in shown
        assert row["explanation"] not in shown
        assert f"Final answer: {row['answer']}" not in shown


def test_general_records_have_no_answer() -> None:
    records = read(PackagedSource(name="general"))
    assert len(records) == 320
    assert all(record.answer is None for record in records)
    assert all([m["role"] for m in record.messages] == ["user"] for record in records)


def test_the_medical_prompt_lists_options_and_asks_for_a_choice() -> None:
    system, user = medical_messages("Which one?", {"A": "this", "B": "that"})
    assert (system["role"], user["role"]) == ("system", "user")
    assert "medical" in system["content"]
    assert user["content"] == (
        "Which one?\nA. this\nB. that\n"
        "Please reason step by step and give the final answer choice at the end."
    )


def test_the_open_medical_prompt_points_to_professional_advice() -> None:
    _, user = medical_messages("Why?", None)
    assert user["content"].startswith("Why?\nPlease reason step by step")
    assert "professional" in user["content"]
    assert "final answer choice" not in user["content"]


def test_sources_are_read_one_after_another(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", {"prompt": "one"}, {"prompt": "two"})
    second = write_rows(tmp_path / "b.jsonl", {"prompt": "three"})
    records = read(FileSource(path=first), FileSource(path=second))
    assert [record.messages[0]["content"] for record in records] == ["one", "two", "three"]
    assert [record.id for record in records] == ["a-1", "a-2", "b-1"]


def test_ids_of_a_file_are_kept(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "x", "id": 17})
    assert read(FileSource(path=path))[0].id == "17"


def test_fields_of_a_file_may_have_other_names(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"q": "x", "a": 4})
    (record,) = read(FileSource(path=path, prompt="q", answer="a"))
    assert (record.messages, record.answer) == (({"role": "user", "content": "x"},), "4")


def test_an_empty_answer_is_no_answer(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "x", "answer": None})
    assert read(FileSource(path=path, answer="answer"))[0].answer is None


def test_options_are_lines_below_the_question(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "x?", "o": {"A": "yes", "B": "no"}})
    (plain,) = read(FileSource(path=path, options="o"))
    assert plain.messages[0]["content"] == "x?\nA. yes\nB. no"
    (medical,) = read(FileSource(path=path, options="o"), medical=True)
    assert medical.messages == medical_messages("x?", {"A": "yes", "B": "no"})


def test_chat_messages_are_taken_as_they_are(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = {"prompt": [{**turn, "mood": "happy"} for turn in turns]}
    path = write_rows(tmp_path / "a.jsonl", rows)
    (record,) = read(FileSource(path=path), medical=True)
    assert list(record.messages) == turns


def test_what_the_assistant_says_last_is_the_answer(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "u"}]
    chat = [*asked, {"role": "assistant", "content": "a"}, *asked]
    answered = {"role": "assistant", "content": "b"}
    rows = [{"prompt": [*chat, answered], "answer": "other"}, {"prompt": chat, "answer": None}]
    path = write_rows(tmp_path / "a.jsonl", *rows)
    first, second = read(FileSource(path=path))
    assert list(first.messages) == list(second.messages) == chat
    assert (first.answer, second.answer) == ("b", None)
    assert read(FileSource(path=path, answer="answer"))[0].answer == "other"


def test_a_run_reads_what_prepare_reads(tmp_path: Path) -> None:
    row = {"question": "Which?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 1}
    path = write_rows(tmp_path / "a.jsonl", row)
    (record,) = read(FileSource(path=path, row=RowConfig(format="medmcqa")), medical=True)
    options = {"A": "w", "B": "x", "C": "y", "D": "z"}
    assert (record.messages, record.answer) == (medical_messages("Which?", options), "B. x")


def test_several_files_are_one_source(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_rows(tmp_path / f"{name}.jsonl", {"prompt": name})
    for path in (str(tmp_path), f"{tmp_path}/?.jsonl"):
        assert [record.id for record in read(FileSource(path=path))] == ["a-1", "b-1"]


def test_rows_that_name_their_teacher_feed_a_pool_each(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {index}", "teacher": ("law", "medical")[index % 2], "part": 1}
        for index in range(6)
    ]
    path = write_rows(tmp_path / "all.jsonl", *rows)
    for remainder, teacher in enumerate(("law", "medical")):
        records = read(FileSource(path=path, where={"teacher": teacher}, limit=2))
        assert [record.prompt for record in records] == [
            record.prompt for record in read(FileSource(path=path))[remainder::2][:2]
        ]
    assert len(read(FileSource(path=path, where={"teacher": "law", "part": "1"}))) == 3


def test_a_value_that_no_row_has_is_an_error_with_those_there_are(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "all.jsonl", {"prompt": "a", "teacher": "law"}, {"prompt": "b"})
    with pytest.raises(
        ValueError, match=r"all\.jsonl: where: no row has .*'med'.*teacher: \['law'\]$"
    ):
        read(FileSource(path=path, where={"teacher": "med"}))
    with pytest.raises(ValueError, match=r"where: no row has .*; found tutor: none$"):
        read(FileSource(path=path, where={"tutor": "med"}))


def test_a_row_is_chosen_by_truth_values_and_numbers_as_json_writes_them(tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "kept": n % 2 == 0, "half": n / 2, "no": None} for n in range(4)]
    path = write_rows(tmp_path / "all.jsonl", *rows)
    for where, expected in [
        ({"kept": True}, ["0", "2"]),
        ({"kept": "false"}, ["1", "3"]),
        ({"half": "0.5"}, ["1"]),
        ({"no": "null", "half": "1.0"}, ["2"]),
    ]:
        source = FileSource.model_validate({"path": path, "where": where})
        assert [record.messages[0]["content"] for record in read(source)] == expected


def test_a_pool_of_files_without_rows_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    pool = PoolConfig(sources=[FileSource(path=str(tmp_path / "empty.jsonl"))])
    for empty in (pool, PoolConfig(sources=[])):
        with pytest.raises(ValueError, match=r"^data\.pools\.law: its sources have no record"):
            check_pool(empty, "law")


def test_the_limit_takes_the_first_records(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", *({"prompt": str(index)} for index in range(5)))
    records = read(FileSource(path=path, limit=2))
    assert [record.messages[0]["content"] for record in records] == ["0", "1"]


ROWS = [
    {"prompt": "one", "answer": "1", "options": {"A": "a", "B": "b"}},
    {"prompt": "two", "answer": None, "options": {"A": "c", "B": "d"}},
]


def test_every_kind_of_file_gives_the_same_records(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", *ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    found = [
        read(FileSource(path=str(file), answer="answer", options="options"))
        for file in sorted(tmp_path.iterdir())
    ]
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    (tmp_path / "b.json").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    assert [r.id for r in read(FileSource(path=str(tmp_path / "b.json")))] == ["b-1", "b-2"]
    (tmp_path / "a.csv").write_text('prompt,answer\none,1\n"two\nlines",2\n')
    records = read(FileSource(path=str(tmp_path / "a.csv"), answer="answer"))
    assert [(r.messages[0]["content"], r.answer) for r in records] == [
        ("one", "1"),
        ("two\nlines", "2"),
    ]


def test_an_empty_cell_is_no_answer_and_one_too_many_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("prompt,answer\none,\n")
    assert read(FileSource(path=str(file), answer="answer"))[0].answer is None
    file.write_text("prompt,answer\none,1\nhello, world,1\n")
    with pytest.raises(ValueError, match=r"a\.csv: row 2 has more cells than the first line"):
        read(FileSource(path=str(file), answer="answer"))


def test_rows_of_one_parquet_file_may_have_other_options(tmp_path: Path) -> None:
    options = [{"A": "a", "B": "b"}, {"A": "c", "B": "d", "C": "e"}]
    rows = [{"prompt": "x?", "options": some} for some in options]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read(FileSource(path=str(tmp_path / "a.parquet"), options="options"))
    assert first.messages[0]["content"] == "x?\nA. a\nB. b"
    assert second.messages[0]["content"] == "x?\nA. c\nB. d\nC. e"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with two commits of `org/name`; there is no network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / "datasets--org--name"
    for commit, prompt in (("a" * 40, "old"), ("b" * 40, "new")):
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        write_rows(snapshot / "train.jsonl", {"prompt": prompt}, *ROWS)
        write_rows(snapshot / "test.jsonl", *ROWS)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("b" * 40)
    return tmp_path


def test_a_data_set_of_the_hub_is_read_at_its_revision(hub: Path) -> None:
    records = read(DatasetSource(path="org/name", answer=None))
    assert [record.messages[0]["content"] for record in records] == ["new", "one", "two"]
    assert records[0].id == "org/name/train-1"
    (old,) = read(DatasetSource(path="org/name", revision="a" * 40, limit=1))
    assert old.messages[0]["content"] == "old"
    with pytest.raises(ValueError, match="`hf download --repo-type dataset org/name --revision c"):
        read(DatasetSource(path="org/name", revision="c" * 40))


def test_a_data_set_in_a_directory_has_subsets_and_splits(hub: Path) -> None:
    folder = hub / "mine"
    folder.mkdir()
    for name in ("easy", "hard"):
        write_rows(folder / f"{name}.jsonl", {"prompt": name}, *ROWS)
    configs = [
        {"config_name": name, "data_files": [{"split": "dev", "path": f"{name}.jsonl"}]}
        for name in ("easy", "hard")
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    sources = [DatasetSource(path=str(folder), subset=n, split="dev") for n in ("easy", "hard")]
    records = read(*sources)
    assert [records[0].messages[0]["content"], records[3].messages[0]["content"]] == [
        "easy",
        "hard",
    ]
    assert len({record.id for record in records}) == 6


def test_a_data_set_that_was_saved_is_read_as_a_file_is(hub: Path) -> None:
    made = Dataset.from_list(ROWS)
    made.save_to_disk(hub / "one")
    DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(hub / "splits")
    expected = read(FileSource(path=write_rows(hub / "a.jsonl", *ROWS), answer="answer"))
    for name in ("one", "splits"):
        records = read(DatasetSource(path=str(hub / name), answer="answer"))
        assert [record.id for record in records] == [f"{hub / name}/train-{n}" for n in (1, 2)]
        assert [(r.messages, r.answer) for r in records] == [
            (r.messages, r.answer) for r in expected
        ]
    (record,) = read(DatasetSource(path=str(hub / "splits"), split="test"))
    assert record.messages[0]["content"] == "two"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"split": "dev"}, 'data set .*rows: cannot be read: Unknown split "dev"'),
        ({"subset": "hard"}, "data set .*rows: cannot be read: BuilderConfig 'hard' not found"),
        (
            {"revision": "main"},
            "path: found .*rows', a directory, and revision 'main', expected none",
        ),
        ({"path": "org/absent"}, "path: found 'org/absent', .*hf download --repo-type dataset"),
        ({"path": "./gone"}, "path: found './gone', which does not exist"),
        ({"prompt": "question"}, "data set .*rows/train: row 1 has no field 'question'; it has"),
        ({"path": "SAVED", "split": "dev"}, r"subset None and split 'dev', .* one of \['train'\]"),
        ({"path": "SAVED", "subset": "a"}, "found subset a and split 'train', expected no subset"),
        ({"path": "BAD"}, "data set .*bad: cannot be read: .*: .*JSON"),
    ],
)
def test_a_data_set_that_cannot_be_read_is_named(
    hub: Path, source: dict[str, Any], message: str
) -> None:
    for name in ("rows", "bad"):
        (hub / name).mkdir()
    write_rows(hub / "rows" / "train.jsonl", *ROWS)
    (hub / "bad" / "train.jsonl").write_text('{"prompt": \n')
    Dataset.from_list(ROWS).save_to_disk(hub / "saved")
    paths = {"SAVED": str(hub / "saved"), "BAD": str(hub / "bad"), None: str(hub / "rows")}
    path = source.get("path")
    with pytest.raises(ValueError, match=message):
        read(DatasetSource(**(source | {"path": paths.get(path, path)})))


def test_a_slice_is_no_split() -> None:
    with pytest.raises(ValueError, match=r"split: found 'train\[:10\]', .*`limit` takes the first"):
        DatasetSource(path="org/name", split="train[:10]")


def test_rows_are_counted_to_the_last_of_them(tmp_path: Path) -> None:
    blank_between = "".join(f"{json.dumps(row)}\n\n" for row in ROWS)
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(blank_between)
        assert count_rows(tmp_path / name) == 3
        assert [row.number for row in read_rows(tmp_path / name)] == [1, 3]
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    assert count_rows(tmp_path / "b.json") == 2


@pytest.mark.parametrize(
    ("bad_row", "message"),
    [
        ({"question": "x"}, r"row 2 has no field 'prompt'; it has \['question'\]"),
        ({"prompt": "x"}, "row 2 has no field 'a'"),
        ({"prompt": " ", "a": 1, "o": {}}, "row 2 has 'prompt' empty"),
        ({"prompt": 3, "a": 1, "o": {}}, "row 2 has 'prompt' empty, or neither text nor chat"),
        ({"prompt": [], "a": 1, "o": {}}, "row 2 has no turns in 'prompt'"),
        ({"prompt": [{"role": "user"}], "a": 1, "o": {}}, "row 2 has a turn in 'prompt' whose `c"),
        ({"prompt": ["text"], "a": 1, "o": {}}, "row 2 has no list of turns in 'prompt'"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text"}]}], "a": 1, "o": {}},
            "row 2 has a turn in 'prompt' whose `content` is no text",
        ),
        (
            {"prompt": [{"role": "assistant", "content": "x"}], "a": 1, "o": {}},
            "row 2 has no turn of the user",
        ),
        ({"prompt": "x", "a": 1, "o": 3}, "row 2 has the options 3, expected up to 10 letters"),
        ({"prompt": "x", "a": ["b"], "o": {}}, "row 2 has a list in 'a', expected text"),
        (["x"], "row 2 is a list"),
    ],
)
def test_a_bad_row_is_named_with_its_file(tmp_path: Path, bad_row: Any, message: str) -> None:
    good = {"prompt": "fine", "a": "1", "o": {"A": "yes"}}
    path = write_rows(tmp_path / "rows.jsonl", good, bad_row)
    with pytest.raises(ValueError, match=rf"rows\.jsonl: {message}"):
        read(FileSource(path=path, answer="a", options="o"))


def test_a_row_that_is_not_json_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "x"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"rows\.jsonl: row 2 is not JSON"):
        read(FileSource(path=str(file)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: found '.*gone\.jsonl', which does not exist"):
        read(FileSource(path=str(tmp_path / "gone.jsonl")))


def test_reasoning_tasks_are_shared_out_evenly_and_repeatable() -> None:
    pytest.importorskip("reasoning_gym")
    source = ReasoningGymSource(tasks=["basic_arithmetic", "leg_counting"], size=5, seed=3)
    records = read(source)
    assert Counter(record.id.split("-")[0] for record in records) == {
        "basic_arithmetic": 3,
        "leg_counting": 3,
    }
    assert all(record.answer for record in records)
    assert records == read(source)
    other = read(ReasoningGymSource(tasks=["basic_arithmetic"], size=3, seed=4))
    assert [record.messages for record in other] != [record.messages for record in records[:3]]


def test_without_names_every_reasoning_task_is_asked_that_needs_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("reasoning_gym")
    from reasoning_gym import factory

    few = {name: factory.DATASETS[name] for name in ("chain_sum", "composite", "leg_counting")}
    monkeypatch.setattr(factory, "DATASETS", few)
    found = read(ReasoningGymSource(size=4))
    assert [record.id for record in found] == [
        *("chain_sum-0-0", "chain_sum-0-1", "leg_counting-0-0", "leg_counting-0-1")
    ]


def test_an_unknown_reasoning_task_is_an_error() -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="found \\['no_such_task'\\]"):
        read(ReasoningGymSource(tasks=["no_such_task"]))
