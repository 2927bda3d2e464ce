"""Rows as users have them, as prompts with their answers: right, or refused with the reason."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megadistill.config.rows import RowConfig
from megadistill.config.schema import RowsSource
from megadistill.data.files import BadRowError, Row, read_rows
from megadistill.data.formats import read_options, to_record
from megadistill.data.records import Record

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]}
RESULT = {"role": "tool", "content": "42"}
POOL = RowsSource(prompt="messages")
PREPARE = RowConfig()
REFINE = RowConfig(format="auto", id="id")
READERS: dict[str, RowConfig | RowsSource] = {"pool": POOL, "prepare": PREPARE, "refine": REFINE}


def record_of(values: Any, fields: RowConfig | RowsSource, *, answered: bool = False) -> Record:
    row = Row(source="rows.jsonl", stem="rows", number=7, content=values)
    return to_record(row, fields, answered=answered)


def read_one(file: Path, fields: RowConfig | RowsSource) -> Record:
    (row,) = read_rows(file)
    return to_record(row, fields)


SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Why?"},
    {"from": "gpt", "value": "Because."},
]
SAME_CHAT = {
    "openai": [{"role": "system", "content": "Be brief."}, USER, ANSWER],
    "developer": [{"role": "developer", "content": "Be brief."}, USER, ANSWER],
    "sharegpt": SHAREGPT,
    "both": [{"role": None, "content": None, **turn} for turn in SHAREGPT],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Because."}]},
    ],
    "json": json.dumps(SHAREGPT),
    "python": repr([{"role": "system", "content": "Be brief."}, USER, ANSWER]),
}
"""One chat as it may be written."""


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("notation", SAME_CHAT)
def test_a_chat_is_the_same_prompt_however_it_is_written(notation: str, reader: str) -> None:
    record = record_of({"messages": SAME_CHAT[notation]}, READERS[reader])
    assert record.messages == ({"role": "system", "content": "Be brief."}, USER)
    assert (record.id, record.answer) == ("rows-7", "Because.")


@pytest.mark.parametrize("reader", READERS)
def test_a_chat_in_a_cell_of_a_table_keeps_its_answer_apart(tmp_path: Path, reader: str) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["messages"], [json.dumps([USER, ANSWER])]])
    record = read_one(tmp_path / "a.csv", READERS[reader])
    assert (record.messages, record.answer) == ((USER,), "Because.")


def test_a_prompt_that_only_looks_like_a_list_is_text() -> None:
    for text in ("[1, 2] is a list", '[{"a": 1}]', "[]", "[x", "{'a': 1}"):
        assert record_of({"messages": text}, POOL).messages[0]["content"] == text


def test_refinement_finds_conversations_by_themselves() -> None:
    record = record_of({"id": 3, "conversations": SHAREGPT}, REFINE)
    assert (record.id, record.answer) == ("3", "Because.")
    row = {"messages": "", "question": "Why?", "answer": "So."}
    assert record_of(row, REFINE).answer == "So."


@pytest.mark.parametrize("reader", READERS)
def test_a_chat_ends_before_the_first_call_of_a_tool_and_has_no_answer(reader: str) -> None:
    for turns in ([USER, CALL, RESULT, ANSWER], [USER, {**CALL, "content": "Let me see."}]):
        record = record_of({"messages": turns}, READERS[reader])
        assert (record.messages, record.answer) == ((USER,), None)
        with pytest.raises(BadRowError) as error:
            record_of({"messages": turns}, READERS[reader], answered=True)
        assert error.value.reason == "no_answer"
    called = [{"from": "human", "value": "Why?"}, {"from": "function_call", "value": "{}"}]
    assert record_of({"messages": called}, READERS[reader]).answer is None


def test_only_a_pool_goes_on_from_a_question_behind_an_answer() -> None:
    turns = {"messages": [USER, ANSWER, USER]}
    assert record_of(turns, POOL).messages == (USER, ANSWER, USER)
    assert record_of(turns, PREPARE).messages == (USER,)


@pytest.mark.parametrize(
    ("turns", "reason", "why"),
    [
        (
            [{"role": "judge", "content": "x"}],
            "bad_messages",
            "has a turn of 'judge' in 'messages'",
        ),
        ([USER, {"role": "assistant", "content": None}], "not_text", "whose `content` is no text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}],
            "not_text",
            "whose `content` is no text",
        ),
        ([USER, {"role": "assistant", "content": float("nan")}], "not_text", "is no text"),
        ([ANSWER], "no_question", "has no turn of the user to answer"),
        ([USER, ANSWER, ANSWER], "no_question", "has no turn of the user to answer"),
        ([], "no_answer", "has no turns"),
        (["text"], "bad_messages", "has no list of turns"),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_a_bad_chat_is_refused_with_its_place_and_a_reason(
    turns: list[Any], reason: str, why: str, reader: str
) -> None:
    with pytest.raises(BadRowError, match=f"^rows.jsonl: row 7 .*{why}") as error:
        record_of({"messages": turns}, READERS[reader])
    assert error.value.reason == reason


NOT_ANSWERS = [(["a", "b"], "a list"), ({"text": "a"}, "a dict"), (b"a", "a bytes")]


@pytest.mark.parametrize(("value", "kind"), NOT_ANSWERS)
@pytest.mark.parametrize(
    "fields",
    [RowsSource(prompt="question", answer="answer"), RowConfig(format="pairs"), REFINE],
    ids=["pool", "prepare", "refine"],
)
def test_an_answer_that_is_no_text_is_refused(
    value: Any, kind: str, fields: RowConfig | RowsSource
) -> None:
    with pytest.raises(BadRowError, match=f"row 7 has {kind} in 'answer', expected text") as error:
        record_of({"question": "q", "answer": value}, fields)
    assert error.value.reason == "not_text"


@pytest.mark.parametrize("absent", [None, float("nan")])
def test_null_and_nan_are_no_answer(absent: float | None) -> None:
    row = {"question": "q", "answer": absent}
    assert record_of(row, RowsSource(prompt="question", answer="answer")).answer is None
    for fields in (RowConfig(format="pairs"), REFINE):
        with pytest.raises(BadRowError) as error:
            record_of(row, fields)
        assert error.value.reason == "missing_fields"


def test_what_pandas_writes_for_nothing_is_no_answer(tmp_path: Path) -> None:
    table = pa.table({"question": ["q"], "answer": pa.array([float("nan")])})
    pq.write_table(table, tmp_path / "a.parquet")
    assert (
        read_one(tmp_path / "a.parquet", RowsSource(prompt="question", answer="answer")).answer
        is None
    )


OPTIONS = {"A": "yes", "B": "no", "C": "3"}


@pytest.mark.parametrize(
    "value",
    [
        {"A": "yes", "B": "no", "C": 3},
        {"A": "yes", "B": "no", "C": "3", "D": None, "E": float("nan")},
        ["yes", "no", 3],
        ["yes", "no", 3, None],
        [{"key": "A", "value": "yes"}, {"key": "B", "value": "no"}, {"key": "C", "value": "3"}],
        [{"key": k, "value": OPTIONS.get(k)} for k in "ABCDE"],
        "A. yes\n(B) no\nC: 3",
        "Answer Choices:\nA) yes\nB) no\nC) 3",
        json.dumps(OPTIONS),
        repr(["yes", "no", "3"]),
    ],
)
def test_options_are_the_same_however_they_are_written(value: Any) -> None:
    assert read_options(value) == OPTIONS
    row = {"question": "q", "options": value, "answer": "B"}
    record = record_of(row, RowConfig(format="choices"))
    assert (record.options, record.answer) == (OPTIONS, "B. no")
    pool = record_of(row, RowsSource(prompt="question", options="options"))
    assert pool.question == "q\nA. yes\nB. no\nC. 3"


def test_options_of_a_table_made_of_objects(tmp_path: Path) -> None:
    options = [{"key": "A", "value": "yes"}, {"key": "B", "value": "no"}]
    rows = [{"question": "q", "options": options, "answer": "no"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    record = read_one(tmp_path / "a.parquet", RowConfig(format="choices"))
    assert (record.options, record.answer) == ({"A": "yes", "B": "no"}, "B. no")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"A": "yes", "B": None, "C": "3"}, "bad_options"),
        ({"A": ["yes"], "B": "no"}, "not_text"),
        ([{"label": "A"}], "not_text"),
        (7, "bad_options"),
        (["x"] * 11, "bad_options"),
    ],
)
def test_options_that_are_none_are_refused(value: Any, reason: str) -> None:
    row = {"question": "q", "options": value, "answer": "A"}
    with pytest.raises(BadRowError) as error:
        record_of(row, RowConfig(format="choices"))
    assert error.value.reason == reason


def test_a_pool_reads_every_format_that_prepare_knows() -> None:
    options = {f"op{letter}": f"choice {letter}" for letter in "abcd"}
    row = {"question": "Which?", "cop": "2", **options}
    fields = RowConfig(format="medmcqa", letters_from=1)
    record = record_of(row, fields)
    assert record.answer == "B. choice b"
    assert record.question == "Which?\nA. choice a\nB. choice b\nC. choice c\nD. choice d"
    assert record_of(row, fields.model_copy(update={"open_ended": True})).question == "Which?"
    with pytest.raises(BadRowError, match="has '5' in 'cop', expected 1, 2, 3, 4"):
        record_of(row | {"cop": 5}, fields)


@pytest.mark.parametrize("name", [None, "", " ", float("nan"), ["x"]])
def test_a_row_without_a_name_is_named_by_its_file_and_number(name: Any) -> None:
    assert record_of({"id": name, "messages": "x"}, POOL).id == "rows-7"
