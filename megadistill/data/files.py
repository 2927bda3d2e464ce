"""Rows of data files, one at a time, each with its place; data sets of the hub, as directories."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megadistill.config import resolve_path

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


class Longest(NamedTuple):
    """The longest line that is read, so that memory is bounded."""

    size: int = 64 << 20
    """In bytes."""
    key: str = ""
    """What a user changes to read longer ones."""

    def __str__(self) -> str:
        return f"{self.size >> 20} MiB" + (f" ({self.key})" if self.key else "")


DEFAULT = Longest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of a file as it is (any: a user's JSON)."""

    file: Path
    number: int
    """From 1."""
    values: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file}: row {self.number}"


def read_rows(
    file: Path, longest: Longest = DEFAULT, wanted: set[int] | None = None
) -> Iterator[Row]:
    """The rows of a file, or those whose numbers (from 1) are `wanted`; memory does not grow with it.

    Raises `ValueError` naming the row that cannot be read, or a file that is of none of `SUFFIXES`.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: expected one of {', '.join(SUFFIXES)}")
    reader = {".parquet": _parquet, ".csv": _csv}.get(file.suffix, _lines)
    if file.suffix == ".json" and is_array(file):
        reader = _array
    for number, values in reader(file, longest, wanted):
        if wanted is not None and number not in wanted:
            continue
        if not isinstance(values, dict):
            raise ValueError(
                f"{file}: row {number} is a {type(values).__name__}, expected an object with fields"
            )
        yield Row(file=file, number=number, values=values)


def count_rows(file: Path, longest: Longest = DEFAULT) -> int:
    """The number of a file's last row; of Parquet its footer says so."""
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq  # noqa: PLC0415 - slow to import

        return int(_opened(file, pq.ParquetFile).metadata.num_rows)
    if file.suffix == ".jsonl" or (file.suffix == ".json" and not is_array(file)):
        return max((number for number, _ in _raw_lines(file, longest)), default=0)
    return sum(1 for _ in read_rows(file, longest))


def is_array(file: Path) -> bool:
    """Whether the file is one JSON array; otherwise every line is a value."""
    with file.open("rb") as stream:
        while (byte := stream.read(1)).isspace():
            pass
    return byte == b"["


def array_values(file: Path) -> Iterator[Any]:  # whatever JSON they are
    """The elements of one JSON array, read piece by piece.

    Raises `ValueError` naming the first that cannot be read.
    """
    import ijson  # noqa: PLC0415 - rarely needed

    number = 1
    with file.open("rb") as stream:
        try:
            for values in ijson.items(stream, "item", use_float=True):
                yield values
                number += 1
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: row {number} is not JSON: {error}") from None


def _raw_lines(file: Path, longest: Longest) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers, never more of one than is allowed."""
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(longest.size + 1):
            number += 1
            if len(line) > longest.size:
                raise ValueError(f"{file}: row {number} is longer than {longest}")
            if line.strip():
                yield number, line


def _lines(file: Path, longest: Longest, wanted: set[int] | None) -> Iterator[tuple[int, Any]]:
    for number, line in _raw_lines(file, longest):
        if wanted is not None and number not in wanted:
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: row {number} is not UTF-8: {error}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: row {number} is not JSON: {error}") from None


def _array(file: Path, _longest: Longest, _wanted: set[int] | None) -> Iterator[tuple[int, Any]]:
    return enumerate(array_values(file), start=1)


def _csv(file: Path, longest: Longest, _wanted: set[int] | None) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(longest.size)
    number = 0
    with file.open(encoding="utf-8-sig", newline="") as stream:
        lines = iter(lambda: stream.readline(longest.size + 1), "")  # in characters, not bytes
        try:
            for number, values in enumerate(csv.DictReader(lines), start=1):
                if None in values:
                    raise ValueError(f"{file}: row {number} has more cells than the first line")
                yield number, values
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{file}: row {number + 1} cannot be read, or is longer than {longest}: {error}"
            ) from None


def _parquet(file: Path, _longest: Longest, wanted: set[int] | None) -> Iterator[tuple[int, Any]]:
    """Row by row; row groups without a wanted row are not read."""
    import pyarrow as pa  # noqa: PLC0415 - slow to import
    import pyarrow.parquet as pq  # noqa: PLC0415

    opened = _opened(file, pq.ParquetFile)
    first = 1
    for group in range(opened.metadata.num_row_groups):
        size = opened.metadata.row_group(group).num_rows
        numbers = range(first, first + size)
        first += size
        if wanted is not None and wanted.isdisjoint(numbers):
            continue
        number = numbers.start
        try:
            for batch in opened.iter_batches(batch_size=256, row_groups=[group]):
                for at in range(batch.num_rows):
                    if wanted is None or number in wanted:
                        yield number, batch.slice(at, 1).to_pylist()[0]
                    number += 1
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"{file}: row {number} cannot be read: {error}") from None


def _opened(file: Path, opener: Any) -> Any:  # pyarrow has no types
    import pyarrow as pa  # noqa: PLC0415 - slow to import

    try:
        return opener(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: no Parquet file: {error}") from None


def resolve_dataset(path: str, revision: str | None = None, *, download: bool = True) -> Path:
    """The directory of a data set: a path as in a configuration, or a copy of the hub's.

    With `HF_HUB_OFFLINE=1`, or without `download`, only the cache is asked. Raises `ValueError`
    saying what to run.
    """
    directory = Path(resolve_path(path))
    if directory.is_dir():
        if revision is not None:
            raise ValueError(f"revision: found {revision!r}, expected none for a directory, {path}")
        return directory
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow, rarely needed
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError  # noqa: PLC0415

    try:
        found = snapshot_download(
            path, repo_type="dataset", revision=revision, local_files_only=not download
        )
    except HFValidationError:
        raise ValueError(
            f"path: found {path!r}, expected a directory or `org/name` of the hub"
        ) from None
    except (OSError, HfHubHTTPError) as error:  # LocalEntryNotFoundError is an OSError
        pinned = f" --revision {revision}" if revision else ""
        raise ValueError(
            f"path: found {path!r}, which is neither a directory nor in the Hugging Face cache, and "
            f"not downloadable here ({type(error).__name__}); run "
            f"`hf download --repo-type dataset {path}{pinned}` where there is a network"
        ) from error
    return Path(found)
