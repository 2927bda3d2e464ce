"""Rows of data files, one at a time, each with its place; what they hold is read by `formats`.

Text is UTF-8, or UTF-16 where it begins with its mark; a file may be compressed.
"""

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Self, TextIO

from megadistill.config import resolve_path
from megadistill.config.rows import Location
from megadistill.resolve import check_content, resolve

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
COMPRESSED = (".gz", ".zst")
KNOWN = f"one of {', '.join(SUFFIXES)} (text also as {' or '.join(COMPRESSED)})"
_Rows = Iterator[tuple[int, Any]]
"""Number from 1, and whatever JSON stands there, or the `BadRowError` that says why nothing does."""


class Longest(NamedTuple):
    """The longest line that is read, so that memory is bounded."""

    size: int = 64 << 20
    """In characters."""
    key: str = ""
    """What a user changes to read longer ones."""

    def __str__(self) -> str:
        return f"{self.size >> 20} MiB" + (f" ({self.key})" if self.key else "")


DEFAULT = Longest()


class BadRowError(ValueError):
    """A row that cannot be used."""

    def __init__(self, reason: str, why: str, place: str = "the row") -> None:
        """`reason` is a word, by which such rows are counted; `why` goes on from the row's place."""
        super().__init__(f"{place} {why}")
        self.reason = reason
        self.why = why

    def at(self, place: str) -> Self:
        """The same with the place of the row."""
        return type(self)(self.reason, self.why, place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row as it is."""

    source: str
    """The file, or what else it was read from."""
    stem: str
    number: int
    """From 1."""
    content: Any
    """Whatever JSON it holds, or why it cannot be read."""

    @property
    def place(self) -> str:
        return f"{self.source}: row {self.number}"

    @property
    def name(self) -> str:
        """Identifies it where no field does."""
        return f"{self.stem}-{self.number}"

    @property
    def values(self) -> dict[str, Any]:
        """Its fields. Raises `BadRowError` when it has none."""
        if isinstance(self.content, BadRowError):
            raise self.content.at(self.place)
        if not isinstance(self.content, dict):
            kind = "list" if isinstance(self.content, list) else "single value"
            why = f"is a {kind}, expected an object with fields"
            raise BadRowError("not_an_object", why, self.place)
        return self.content


def files_of(location: Location | None, *, key: str = "path", download: bool = True) -> list[Path]:
    """The files, in order, that a path, a directory, a pattern or a packaged set means.

    Of a data set it is the directory; what is made has none. Raises `ValueError` where nothing is, or
    something that nobody can read.
    """
    if location is None:
        return []
    kind, name, revision = location
    if kind == "dataset":
        return [resolve(kind, name, key=key, revision=revision, download=download)]
    pattern = Path(resolve_path(name))
    if any(mark in name for mark in "*?[") and not pattern.exists():
        found = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    elif (place := resolve(kind, name, key=key)).is_dir():
        found = sorted(file for file in place.iterdir() if _suffix(file) in SUFFIXES)
    else:
        found = [place]
    if not found:
        raise ValueError(f"{key}: found {name!r}, where no data file is")
    if not all(_suffix(file) in SUFFIXES for file in found):
        raise ValueError(f"{key}: found {name!r}, expected {KNOWN}")
    for file in found:
        check_content(file, "data")
    return found


def read_rows(
    file: Path, longest: Longest = DEFAULT, wanted: set[int] | None = None
) -> Iterator[Row]:
    """The rows of a file, or those whose numbers (from 1) are `wanted`; memory does not grow with it.

    Raises `ValueError` where the file cannot be read from some row on; a row that cannot be read says
    so itself.
    """
    number = 0
    try:
        for number, content in _reader(file)(file, longest, wanted):
            if wanted is None or number in wanted:
                content = _unicode(content)
                yield Row(source=str(file), stem=_stem(file), number=number, content=content)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{file}: row {number + 1} cannot be read: {error}") from None


def read_all(files: Iterable[Path], longest: Longest = DEFAULT) -> Iterator[Row]:
    """The rows of several files, one after another."""
    return chain.from_iterable(read_rows(file, longest) for file in files)


def count_rows(file: Path, longest: Longest = DEFAULT) -> int:
    """The number of a file's last row; of Parquet its footer says so."""
    if file.suffix == ".parquet":
        return int(_parquet_file(file).metadata.num_rows)
    if _reader(file) is _json_lines:
        return max((number for number, _ in _lines(file, longest)), default=0)
    return max((row.number for row in read_rows(file, longest)), default=0)


def _unicode(content: Any) -> Any:
    """The same, or why it cannot be written."""
    try:
        json.dumps(content, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        why = f"holds half a character, {half:#x}"
        if 0xDC80 <= half <= 0xDCFF:  # as Python reads bytes
            why = f"is not UTF-8: found the byte {half - 0xDC00:#x}; convert the file (of Windows: "
            why += "`iconv -f cp1252 -t utf-8`)"
        return BadRowError("not_unicode", why)
    return content


def _suffix(file: Path) -> str:
    """The suffix without that of a compression, which a table has inside."""
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def _stem(file: Path) -> str:
    return Path(file.stem).stem if file.suffix in COMPRESSED else file.stem


def _reader(file: Path) -> Any:  # one of the readers below
    suffix = _suffix(file)
    if suffix not in SUFFIXES or (suffix == ".parquet" and file.suffix in COMPRESSED):
        raise ValueError(f"{file}: expected {KNOWN}")
    if suffix == ".json":
        return _array if _is_array(file) else _json_lines
    return {".parquet": _parquet, ".csv": _csv, ".jsonl": _json_lines}[suffix]


def _text(file: Path, newline: str = "\n") -> TextIO:
    """The file's text; bytes that are none come as lone surrogates."""
    stream: io.BufferedReader
    if file.suffix in COMPRESSED:
        import pyarrow as pa  # noqa: PLC0415 - slow to import

        stream = io.BufferedReader(pa.input_stream(str(file), compression="detect"))
    else:
        stream = file.open("rb")
    wide = stream.peek(2).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if wide else "utf-8-sig"
    return io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline=newline)


def _is_array(file: Path) -> bool:
    """Whether the file is one JSON array; otherwise every line is a value."""
    with _text(file) as stream:
        while (character := stream.read(1)).isspace():
            pass
    return character == "["


def _lines(file: Path, longest: Longest) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers, never more of one than is allowed."""
    with _text(file) as stream:
        number = 0
        while line := stream.readline(longest.size + 1):
            number += 1
            if len(line) > longest.size:
                raise ValueError(f"{file}: row {number} is longer than {longest}")
            if line.strip():
                yield number, line


def _json_lines(file: Path, longest: Longest, wanted: set[int] | None) -> _Rows:
    for number, line in _lines(file, longest):
        if wanted is None or number in wanted:
            yield number, _loaded(line)


def _loaded(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRowError("not_json", f"is not JSON: {error}")


def _array(file: Path, _longest: Longest, _wanted: set[int] | None) -> _Rows:
    """The elements of one JSON array, read piece by piece."""
    import ijson  # noqa: PLC0415 - rarely needed

    number = 0
    with _text(file) as stream:
        # ijson reads bytes of UTF-8.
        encoded = SimpleNamespace(
            read=lambda size: stream.read(size).encode("utf-8", "surrogateescape")
        )
        try:
            for number, values in enumerate(ijson.items(encoded, "item", use_float=True), start=1):
                yield number, values
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: row {number + 1} is not JSON: {error}") from None


def _csv(file: Path, longest: Longest, _wanted: set[int] | None) -> _Rows:
    csv.field_size_limit(longest.size)
    number = 0
    with _text(file, newline="") as stream:
        try:
            for number, cells in enumerate(csv.DictReader(_short(stream, longest)), start=1):
                yield number, _row_of_cells(cells)
        except csv.Error as error:
            why = f"is longer than {longest}" if "limit" in str(error) else f"is no CSV: {error}"
            raise ValueError(f"{file}: row {number + 1} {why}") from None


def _short(stream: TextIO, longest: Longest) -> Iterator[str]:
    while line := stream.readline(longest.size + 1):
        if len(line) > longest.size:
            raise csv.Error("line larger than limit")
        yield line


def _row_of_cells(cells: dict[Any, Any]) -> dict[str, Any] | BadRowError:
    """Blank cells behind the last column are none."""
    if any(cell.strip() for cell in cells.pop(None, ())):
        return BadRowError("too_many_cells", "has more cells than the first line")
    return cells


def _parquet(file: Path, _longest: Longest, wanted: set[int] | None) -> _Rows:
    """Row by row; row groups without a wanted row are not read."""
    import pyarrow as pa  # noqa: PLC0415 - slow to import

    opened = _parquet_file(file)
    first = 1
    for group in range(opened.metadata.num_row_groups):
        numbers = range(first, first + opened.metadata.row_group(group).num_rows)
        first = numbers.stop
        if wanted is not None and wanted.isdisjoint(numbers):
            continue
        batches = opened.iter_batches(batch_size=256, row_groups=[group])
        rows = (batch.slice(at, 1) for batch in batches for at in range(batch.num_rows))
        try:
            for number, row in zip(numbers, rows, strict=True):
                if wanted is None or number in wanted:
                    yield number, row.to_pylist()[0]
        except pa.ArrowException as error:
            raise OSError(error) from None


def _parquet_file(file: Path) -> Any:  # pyarrow has no types
    import pyarrow as pa  # noqa: PLC0415 - slow to import
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: no Parquet file: {error}") from None
