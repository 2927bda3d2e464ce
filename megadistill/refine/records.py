"""Questions with raw answers: read from a user's files, every row accounted for.

A row becomes a record, or a rejection with a reason. A record may carry a `problem`, for which it
keeps its answer and nothing is asked of any model.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from megadistill.config.refine import InputConfig
from megadistill.config.rows import Location
from megadistill.data.files import BadRowError, Row, files_of, read_all
from megadistill.data.formats import to_record
from megadistill.data.records import Record
from megadistill.launch.shards import KnownFile, Runtime, ShardArguments
from megadistill.refine.blocks import part_of, read_rows_of, write_rows

EXCERPT = 200
OF_CHOICES = {"options", "letters_from", "open_ended"}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A row of the input that is no record."""

    row: int
    """From 1."""
    reason: str
    excerpt: str


def input_files(config: InputConfig) -> list[Path]:
    """The files that `input.path` names. Raises `ValueError` when there is none."""
    return files_of(Location("data", config.path), key="input.path")


def read_settings(config: InputConfig) -> dict[str, Any]:
    """The settings on which records depend (any: JSON)."""
    unread = set() if config.format in ("choices", "medmcqa") else OF_CHOICES
    return config.model_dump(mode="json", exclude=unread)


def read_records(config: InputConfig) -> tuple[list[Record], list[Rejection]]:
    """All rows of the input, each either a record or a rejection."""
    records: list[Record] = []
    rejected: list[Rejection] = []
    seen: dict[str, tuple[str, str | None]] = {}
    for row in islice(read_all(input_files(config)), config.limit):
        try:
            record = _to_record(row, config, len(records))
            content = (record.question, record.answer)
            if seen.get(record.id) == content:
                raise BadRowError("duplicate", "repeats an earlier one")
            if record.id in seen:  # other content under a taken name is kept under a new one
                record = replace(record, id=f"{record.id}~{row.number}")
            seen[record.id] = content
            records.append(record)
        except BadRowError as error:
            found = row.content
            shown = str(found) if isinstance(found, BadRowError) else repr(found)
            excerpt = shown[:EXCERPT].encode("utf-8", "replace").decode()
            rejected.append(Rejection(row=row.number, reason=error.reason, excerpt=excerpt))
    if not records:
        examples = {row.reason: row for row in reversed(rejected)}  # the first of each
        found = "".join(
            f"; {count} {reason}, such as row {examples[reason].row}: {examples[reason].excerpt}"
            for reason, count in Counter(row.reason for row in rejected).most_common()
        )
        raise ValueError(
            f"input.path: {config.path} has no usable record among {len(rejected)} rows{found}"
        )
    return records, rejected


def _to_record(row: Row, config: InputConfig, index: int) -> Record:
    """One row as a record. Raises `BadRowError` with the reason."""
    record = to_record(row, config, answered=True)
    if record.messages[-1]["role"] != "user":
        raise BadRowError("no_question", "has no turn of the user before the answer")
    if not record.messages[-1]["content"].strip():
        raise BadRowError("empty_question", "has a question without text")
    if not record.raw_answer.strip():
        raise BadRowError("empty_answer", "has an answer without text")
    texts = [record.id, record.raw_answer, *(turn["content"] for turn in record.messages)]
    problem = None
    if sum(map(len, texts)) > config.max_characters:
        problem = "too_long"
    elif any(_CONTROL.search(text) for text in texts):
        problem = "control_characters"
    return replace(record, index=index, prompt=record.messages, options=None, problem=problem)


class PartArguments(ShardArguments):
    """A part of the records, whose rows are saved in blocks."""

    records: KnownFile
    part: int
    of: int
    block: int
    gpu: Runtime[bool]

    def read(self) -> list[Record]:
        return list(part_of(load_records(self.records.path), self.part, self.of))


def write_records(file: Path, records: Iterable[Record]) -> None:
    """Keep the records as Parquet, whole or absent."""
    rows = [
        {name: getattr(record, name) for name in RECORD_COLUMNS}
        | {"messages": json.dumps(record.messages)}
        for record in records
    ]
    write_rows(file, rows, RECORD_COLUMNS)


def load_records(file: Path) -> list[Record]:
    """The reverse of `write_records`."""
    return [
        Record(**row, prompt=tuple(json.loads(messages)))
        for row in read_rows_of(file)
        for messages in [row.pop("messages")]
    ]


RECORD_COLUMNS = {
    "index": "int64",
    "id": "string",
    "messages": "string",
    "answer": "string",
    "problem": "string",
}
