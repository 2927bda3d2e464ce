"""Finished rows of a shard: Parquet files of a fixed number of rows, each whole or absent.

A row is named by a hash of what it depends on, its key. A shard takes the rows that are there already:
its own, and those of shards that an earlier call of its stage had, so that other sizes, another number
of shards or one more row of input repeat nothing. A row that failed has no key, and is made again.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from megadistill.atomic import atomic_file, remove_torn, write_atomic
from megadistill.inference.staging import FORMAT
from megadistill.launch.shards import (
    EARLIER,
    FAILED,
    FOR_KEY,
    ShardArguments,
    ShardFolder,
    content_hash,
)

Item = TypeVar("Item")
Row = dict[str, Any]  # values of several types, as its columns say
Columns = Mapping[str, Any]
"""Column name -> pyarrow's name of a simple type, or a pyarrow type."""
FIGURES = "figures.json"
KEY = "key"
EXTENT = {
    *("records", "rewrites", "similarities", "items", "answers"),
    *("part", "of", "block", "limit", "tau", "benchmark"),
}
"""Arguments that say which rows a shard makes, and not how."""


class RowNamer:
    """Makes a row's key of a shard's arguments and of what the row is made from."""

    def __init__(self, arguments: ShardArguments) -> None:
        settings = arguments.model_dump(mode="json", context=FOR_KEY, exclude=EXTENT)
        self._settings = content_hash([FORMAT, type(arguments).__name__, settings])

    def __call__(self, *content: Any) -> str:  # plain JSON values
        return content_hash([self._settings, *content])


class Blocks:
    """The rows of one shard by position, saved `size` at a time.

    A block is written when its last row has come, so what a killed shard loses is at most the
    blocks in work; what it finds again it does not repeat.
    """

    def __init__(
        self, directory: Path, columns: Columns, labels: Sequence[Row], *, size: int
    ) -> None:
        """`labels`: what is known of each row beforehand, its `key` among it."""
        self.directory = directory
        self.size = size
        self._labels = labels
        self._columns = {**columns, KEY: "string"}
        self._pending: dict[int, dict[int, Row]] = {}
        self._saved: set[int] = set()
        remove_torn(directory)
        (directory / FAILED).unlink(missing_ok=True)
        self._take_what_is_there()

    def missing(self) -> list[int]:
        """Positions whose row is not there, in order."""
        taken = {position for rows in self._pending.values() for position in rows}
        positions = range(len(self._labels))
        return [p for p in positions if p // self.size not in self._saved and p not in taken]

    def add(self, position: int, row: Row, *, failed: bool = False) -> bool:
        """Take the row of a position; returns whether that completed a block."""
        number = position // self.size
        pending = self._pending.setdefault(number, {})
        assert position not in pending, f"position {position} came twice"
        pending[position] = {**row, **self._labels[position], **({KEY: None} if failed else {})}
        if len(pending) < min(self.size, len(self._labels) - number * self.size):
            return False
        rows = [pending[p] for p in sorted(pending)]
        if any(row[KEY] is None for row in rows):
            (self.directory / FAILED).touch()
        write_rows(self._file(number), rows, self._columns)
        del self._pending[number]
        self._saved.add(number)
        return True

    def join(self, name: str) -> None:
        """Make one file of all blocks, in their place unless some rows are to be made again."""
        rows = read_blocks([self.directory])
        assert len(rows) == len(self._labels), f"found {len(rows)} of {len(self._labels)} rows"
        write_rows(self.directory / name, rows, self._columns)
        if not (self.directory / FAILED).exists():
            for file in self.directory.glob("block-*.parquet"):
                file.unlink()

    def _file(self, number: int) -> Path:
        return self.directory / f"block-{number:06d}.parquet"

    def _take_what_is_there(self) -> None:
        wanted: dict[str, list[int]] = {}
        for position, label in enumerate(self._labels):
            number = position // self.size
            if position % self.size == 0 and None not in _keys_in(self._file(number)):
                self._saved.add(number)
            if number not in self._saved:
                wanted.setdefault(label[KEY], []).append(position)
        for file in self._sources() if wanted else []:
            if wanted.keys() & set(_keys_in(file)):
                for row in read_rows_of(file):
                    for position in wanted.pop(row[KEY], ()):
                        self.add(position, row)

    def _sources(self) -> list[Path]:
        """Files of this shard, and of those that its stage has no more."""
        folders = [self.directory]
        shards = self.directory.parents[1]
        if (file := shards.parent / EARLIER).exists():
            folders += [ShardFolder(shards / key).output for key in json.loads(file.read_text())]
        return [file for folder in folders for file in sorted(folder.glob("*.parquet"))]


def _keys_in(file: Path) -> list[str | None]:
    """The keys of a file's rows; of none that is there, or has no keys, one that is missing."""
    if not file.exists() or KEY not in pq.read_schema(file).names:
        return [None]
    keys: list[str | None] = pq.read_table(file, columns=[KEY])[KEY].to_pylist()
    return keys


def part_of(items: Sequence[Item], part: int, of: int) -> Sequence[Item]:
    """The contiguous share of one of `of` shards; shares differ by at most one item."""
    return items[len(items) * part // of : len(items) * (part + 1) // of]


def add_figures(output: Path, figures: Mapping[str, float]) -> None:
    """Add what this try of a shard did to what its earlier tries did."""
    total = Counter(sum_figures([output]))
    total.update(figures)
    write_atomic(output / FIGURES, json.dumps(total))


def sum_figures(outputs: Iterable[Path]) -> dict[str, float]:
    """What shards did in all."""
    total: Counter[str] = Counter()
    for output in outputs:
        if (file := output / FIGURES).exists():
            total.update(json.loads(file.read_text()))
    return dict(total)


def read_blocks(directories: Iterable[Path]) -> list[Row]:
    """The rows of finished shards, in order."""
    return [
        row
        for directory in directories
        for file in sorted(directory.glob("block-*.parquet"))
        for row in read_rows_of(file)
    ]


def write_rows(file: Path, rows: Sequence[Row], columns: Columns) -> None:
    """Write a Parquet file that `datasets.load_dataset` reads, so that it is whole or absent."""
    import datasets  # noqa: PLC0415 - slow to import, and a reader does without

    datasets.disable_progress_bars()
    schema = pa.schema(
        [(name, getattr(pa, t)() if isinstance(t, str) else t) for name, t in columns.items()]
    )
    table = datasets.Dataset(pa.Table.from_pylist([dict(row) for row in rows], schema=schema))
    with atomic_file(file) as made:
        table.to_parquet(made)


def read_rows_of(file: Path) -> list[Row]:
    """Every row of a Parquet file."""
    rows: list[Row] = pq.read_table(file).to_pylist()
    return rows
