"""Formats of the input."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megadistill.config.refine import InputConfig
from megadistill.inference.templates import load_template
from megadistill.refine.records import load_records, read_records, write_records
from megadistill.refine.rewriting import rewrite_chat

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "What is a fig?"},
    {"role": "assistant", "content": "A fruit."},
]
ROWS: list[dict[str, Any]] = [
    {"question": "What is a fig?", "answer": "A fruit."},
    {"messages": CHAT},
    {"instruction": "Translate.", "input": "une figue", "output": "a fig"},
    {"instruction": "Name a fruit.", "input": "", "output": "A fig"},
]


def write(file: Path, rows: list[dict[str, Any]]) -> InputConfig:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            names = list(dict.fromkeys(name for row in rows for name in row))
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            writer.writerows(
                {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
                for row in rows
            )
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return InputConfig(path=str(file))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_every_format_is_read_from_every_file(tmp_path: Path, suffix: str) -> None:
    for number, row in enumerate(ROWS):
        config = write(tmp_path / f"rows{number}.{suffix}", [row])
        (record,), rejected = read_records(config)
        assert not rejected
        assert record.id == f"rows{number}-1"
        texts = [turn["content"] for turn in record.messages]
        expected: Any = [
            (["What is a fig?"], "A fruit."),
            (["Be brief.", "Hi", "Hello", "What is a fig?"], "A fruit."),
            (["Translate.\n\nune figue"], "a fig"),
            (["Name a fruit."], "A fig"),
        ]
        assert (texts, record.answer) == expected[number]


def test_a_csv_may_hold_very_long_cells(tmp_path: Path) -> None:
    config = write(tmp_path / "rows.csv", [{"question": "q", "answer": "a" * 200_000}])
    (record,), _ = read_records(config)
    assert (len(record.raw_answer), record.problem) == (200_000, "too_long")


def test_fields_may_have_other_names(tmp_path: Path) -> None:
    row = {"key": 5, "prompt": "What is a fig?", "reply": "A fruit.", "messages": "unused"}
    write(tmp_path / "rows.jsonl", [row])
    config = InputConfig(
        path=str(tmp_path / "rows.jsonl"),
        format="pairs",
        id="key",
        question="prompt",
        answer="reply",
    )
    (record,), _ = read_records(config)
    assert (record.id, record.answer) == ("5", "A fruit.")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no_answer"),
        ("nothing", "bad_messages"),
        ([{"role": "judge", "content": "x"}], "bad_messages"),
        ([{"role": "user", "content": "x"}], "no_answer"),
        ([{"role": "assistant", "content": "x"}], "no_question"),
        (
            [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}],
            "no_question",
        ),
        ([{"role": "user", "content": {"x": 1}}], "not_text"),
    ],
)
def test_bad_chats_are_rejected(tmp_path: Path, messages: Any, reason: str) -> None:
    write(tmp_path / "rows.jsonl", [ROWS[0], {"messages": messages}])
    _, (rejection,) = read_records(InputConfig(path=str(tmp_path / "rows.jsonl")))
    assert (rejection.row, rejection.reason) == (2, reason)


def test_an_input_without_records_is_an_error(tmp_path: Path) -> None:
    config = write(tmp_path / "rows.jsonl", [{"a": 1}])
    with pytest.raises(ValueError, match="no usable record among 1 rows; 1 "):
        read_records(config)
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(ValueError, match=r"expected one of \.jsonl, \.json, \.parquet, \.csv"):
        read_records(InputConfig(path=str(tmp_path / "rows.txt")))


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    records, _ = read_records(write(tmp_path / "rows.jsonl", ROWS))
    write_records(tmp_path / "records.parquet", records)
    assert load_records(tmp_path / "records.parquet") == records


def test_a_rewrite_keeps_the_turns_before(tmp_path: Path) -> None:
    (record,), _ = read_records(write(tmp_path / "rows.jsonl", [ROWS[1]]))
    template = load_template("packaged:rewrite-maths-v1", ("question", "answer"))
    chat = rewrite_chat(record, template)
    assert [turn["role"] for turn in chat] == ["system", "user", "assistant", "user", "assistant"]
    assert chat[3]["content"].startswith("What is a fig?\n\nReference answer:\nA fruit.")
    assert chat[4]["content"] == "Great! Let's think step by step."


def test_packaged_sets_are_read() -> None:
    records, rejected = read_records(InputConfig(path="packaged:health_answers"))
    assert len(records) >= 50
    assert not rejected
    assert all(record.problem is None for record in records)


def test_an_input_without_a_usable_row_says_why_with_an_example_of_each_reason(
    tmp_path: Path,
) -> None:
    rows = [
        "not json",
        '{"question": "a", "answer": " "}',
        "[1]",
        '{"question": "b", "answer": ""}',
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    expected = (
        "has no usable record among 4 rows; 2 empty_answer, such as row 2: {'question': 'a', "
        "'answer': ' '}; 1 not_json, such as row 1: the row is not JSON: "
        "Expecting value: line 1 column 1 (char 0); 1 not_an_object, such as row 3: "
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        read_records(InputConfig(path=str(tmp_path / "in.jsonl")))
