"""Finished rows of a shard: Parquet files of a fixed number of rows, each whole or absent."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from megadistill.atomic import atomic_file, remove_torn, write_atomic

Item = TypeVar("Item")
Row = dict[str, Any]  # values of several types, as its columns say
Columns = Mapping[str, Any]
"""Column name -> pyarrow's name of a simple type, or a pyarrow type."""
FIGURES = "figures.json"


class Blocks:
    """The rows of one shard by position, 0 to `total`, saved `size` at a time.

    A block is written when its last row has come, so what a killed shard loses is at most the
    blocks in work; what it finds again it does not repeat.
    """

    def __init__(self, directory: Path, columns: Columns, *, total: int, size: int) -> None:
        self.directory = directory
        self.total = total
        self.size = size
        self._columns = columns
        self._pending: dict[int, dict[int, Row]] = {}
        remove_torn(directory)

    def missing(self) -> list[int]:
        """Positions whose block is not there, in order."""
        return [p for p in range(self.total) if not self._file(p // self.size).exists()]

    def add(self, position: int, row: Row) -> bool:
        """Take the row of a position; returns whether that completed a block."""
        number = position // self.size
        pending = self._pending.setdefault(number, {})
        assert position not in pending, f"position {position} came twice"
        pending[position] = row
        if len(pending) < min(self.size, self.total - number * self.size):
            return False
        write_rows(self._file(number), [pending[p] for p in sorted(pending)], self._columns)
        del self._pending[number]
        return True

    def join(self, name: str) -> None:
        """Make one file of all blocks, in their place."""
        rows = read_blocks([self.directory])
        assert len(rows) == self.total, f"found {len(rows)} of {self.total} rows"
        write_rows(self.directory / name, rows, self._columns)
        for file in self.directory.glob("block-*.parquet"):
            file.unlink()

    def _file(self, number: int) -> Path:
        return self.directory / f"block-{number:06d}.parquet"


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
