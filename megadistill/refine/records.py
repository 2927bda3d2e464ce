"""Questions with raw answers: read from a user's file, every row accounted for.

A row becomes a record, or a rejection with a reason. A record may carry a `problem`, for which it
keeps its answer and nothing is asked of any model.
"""

import csv
import importlib.resources
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megadistill.config import resolve_path
from megadistill.config.refine import InputConfig
from megadistill.data.files import SUFFIXES, array_values, is_array
from megadistill.types import Message

PACKAGED = "packaged:"
ROLES = ("system", "user", "assistant", "tool")
EXCERPT = 200
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class QaRecord:
    """A question and its raw answer."""

    index: int
    """Position among the records, from 0."""
    id: str
    messages: tuple[Message, ...]
    """The chat up to the answer; its last turn is the user's."""
    answer: str
    problem: str | None = None
    """Why it is not refined."""

    @property
    def question(self) -> str:
        """What a reader of one text needs: the user's turn, or the whole chat where it has more."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in self.messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A row of the input that is no record."""

    row: int
    """From 1."""
    reason: str
    excerpt: str


class BadRowError(ValueError):
    """Its message is the reason for which a row is rejected."""


def input_file(path: str) -> Path:
    """The file that `input.path` names. Raises `ValueError` when there is none."""
    if path.startswith(PACKAGED):
        folder = importlib.resources.files("megadistill.data") / "sets"
        file = Path(str(folder / f"{path.removeprefix(PACKAGED)}.jsonl"))
    else:
        file = Path(resolve_path(path))
    if not file.is_file():
        raise ValueError(f"input.path: found {path!r}, which is no file ({file})")
    return file


def read_records(config: InputConfig) -> tuple[list[QaRecord], list[Rejection]]:
    """All rows of the input, each either a record or a rejection."""
    file = input_file(config.path)
    records: list[QaRecord] = []
    rejected: list[Rejection] = []
    seen: dict[str, tuple[str, str]] = {}
    for number, row in enumerate(islice(read_rows(file), config.limit), start=1):
        try:
            record = to_record(row, config, len(records), f"{file.stem}-{number}")
            content = (record.question, record.answer)
            if seen.get(record.id) == content:
                raise BadRowError("duplicate")
            if record.id in seen:  # other content under a taken name is kept under a new one
                renamed = {"id": f"{record.id}~{number}"}
                record = QaRecord(**{**_fields(record), **renamed})
            seen[record.id] = content
            records.append(record)
        except BadRowError as error:
            excerpt = repr(row)[:EXCERPT].encode("utf-8", "replace").decode()
            rejected.append(Rejection(row=number, reason=str(error), excerpt=excerpt))
    if not records:
        raise ValueError(f"input.path: {file} has no usable record among {len(rejected)} rows")
    return records, rejected


def _fields(record: QaRecord) -> dict[str, Any]:  # its fields have several types
    return {name: getattr(record, name) for name in QaRecord.__dataclass_fields__}


def read_rows(file: Path) -> Iterator[Any]:  # whatever JSON a row holds
    """The rows of a file as they are; a line that is no JSON comes as `bytes`.

    Raises `ValueError` where a JSON array is none from some element on.
    """
    if file.suffix == ".parquet":
        yield from _parquet_rows(file)
    elif file.suffix == ".csv":
        yield from _csv_rows(file)
    elif file.suffix == ".json" and is_array(file):
        yield from array_values(file)
    elif file.suffix in SUFFIXES:
        yield from _jsonl_rows(file)
    else:
        known = ", ".join(SUFFIXES)
        raise ValueError(f"input.path: found {file.name!r}, expected one of {known}")


def _jsonl_rows(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield line.encode("utf-8", "surrogateescape")


def _csv_rows(file: Path) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        yield from csv.DictReader(stream)


def _parquet_rows(file: Path) -> Iterator[Any]:
    import pyarrow.parquet  # noqa: PLC0415 - slow to import, rarely needed

    for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
        yield from batch.to_pylist()


def to_record(row: Any, config: InputConfig, index: int, default_id: str) -> QaRecord:
    """One row as a record. Raises `BadRowError` with the reason."""
    if isinstance(row, bytes):
        raise BadRowError("not_json")
    if not isinstance(row, dict):
        raise BadRowError("not_an_object")
    messages, answer = _chat(row, config)
    name = row.get(config.id)
    record_id = default_id if name is None or isinstance(name, dict | list) else str(name)
    texts = [record_id, answer, *(turn["content"] for turn in messages)]
    if any(_has_surrogate(text) for text in texts):
        raise BadRowError("not_unicode")
    if not messages[-1]["content"].strip():
        raise BadRowError("empty_question")
    if not answer.strip():
        raise BadRowError("empty_answer")
    return QaRecord(
        index=index,
        id=record_id,
        messages=tuple(messages),
        answer=answer,
        problem=_problem(texts, config.max_characters),
    )


def _chat(row: Mapping[str, Any], config: InputConfig) -> tuple[list[Message], str]:
    """The chat up to the answer, and the answer."""

    def has(*names: str) -> bool:
        return all(row.get(name) is not None for name in names)

    kind = config.format
    if kind in ("auto", "messages") and has(config.messages):
        return _from_messages(row[config.messages])
    if kind in ("auto", "pairs") and has(config.question, config.answer):
        user = {"role": "user", "content": _text(row[config.question])}
        return [user], _text(row[config.answer])
    if kind in ("auto", "instruction") and has(config.instruction, config.output):
        parts = [_text(row[config.instruction]), _text(row.get(config.instruction_input))]
        user = {"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}
        return [user], _text(row[config.output])
    raise BadRowError("missing_fields")


def _from_messages(value: Any) -> tuple[list[Message], str]:
    """A chat (any: it is a user's JSON), also one that a CSV file holds as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRowError("bad_messages") from None
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise BadRowError("bad_messages")
    turns: list[Message] = [
        {"role": str(t.get("role")), "content": _text(t.get("content"))} for t in value
    ]
    if any(turn["role"] not in ROLES for turn in turns):
        raise BadRowError("bad_messages")
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise BadRowError("no_answer")
    before = turns[: answers[-1]]
    if not before or before[-1]["role"] != "user":
        raise BadRowError("no_question")
    return before, turns[answers[-1]]["content"]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str | bool | int | float):
        return str(value)
    raise BadRowError("not_text")


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _problem(texts: Sequence[str], max_characters: int) -> str | None:
    if sum(map(len, texts)) > max_characters:
        return "too_long"
    if any(_CONTROL.search(text) for text in texts):
        return "control_characters"
    return None


def write_records(file: Path, records: Iterable[QaRecord]) -> None:
    """Keep the records as Parquet, whole or absent."""
    from megadistill.refine.blocks import write_rows  # noqa: PLC0415 - pyarrow, where needed

    rows = [_fields(record) | {"messages": json.dumps(record.messages)} for record in records]
    write_rows(file, rows, RECORD_COLUMNS)


def load_records(file: Path) -> list[QaRecord]:
    """The reverse of `write_records`."""
    from megadistill.refine.blocks import read_rows_of  # noqa: PLC0415 - pyarrow, where needed

    return [
        QaRecord(**row | {"messages": tuple(json.loads(row["messages"]))})
        for row in read_rows_of(file)
    ]


RECORD_COLUMNS = {
    "index": "int64",
    "id": "string",
    "messages": "string",
    "answer": "string",
    "problem": "string",
}
