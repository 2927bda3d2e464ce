"""Records drawn at random from each part of a mixture, as many as the recipe says."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from megadistill.config import PrepareConfig
from megadistill.config.prepare import MixtureConfig, PartConfig
from megadistill.data.files import Row, count_rows, read_rows
from megadistill.data.formats import to_record
from megadistill.data.records import Record
from megadistill.prepare.cleaning import Cleaner
from megadistill.prepare.files import files_of, longest_of
from megadistill.prepare.sampling import draw_rows, largest_remainder

SPARE = 1.25
"""Rows drawn for each record wanted, since some are dropped; when too few stay, more are drawn."""


def quotas(recipe: MixtureConfig) -> dict[str, int | None]:
    """Records of each part; None means all it has."""
    if recipe.total is None:
        return {name: part.count for name, part in recipe.parts.items()}
    weights = {name: part.weight or 0 for name, part in recipe.parts.items()}
    return dict(largest_remainder(weights, recipe.total))


def mix(config: PrepareConfig, recipe: MixtureConfig, cleaner: Cleaner) -> Iterator[Record]:
    """The clean records of every part. Raises `ValueError` when a part has too few."""
    for name, quota in quotas(recipe).items():
        part = recipe.parts[name]
        files = files_of(part.source)
        if quota is None:
            yield from cleaner.clean(_read_all(config, files, name, part, cleaner))
        elif quota:
            yield from _draw(config, files, (name, part, quota), cleaner)


def _read_all(
    config: PrepareConfig, files: Sequence[Path], name: str, part: PartConfig, cleaner: Cleaner
) -> Iterator[Record]:
    for file in files:
        for row in read_rows(file, longest_of(config)):
            record = cleaner.read(row, name, lambda found: to_record(found, part.row, part=name))
            if record is not None:
                yield record


def _draw(
    config: PrepareConfig,
    files: Sequence[Path],
    share: tuple[str, PartConfig, int],
    cleaner: Cleaner,
) -> Iterator[Record]:
    """`quota` clean records; more rows are drawn as long as too few of those drawn are clean."""
    name, part, quota = share
    sizes = [count_rows(file, longest_of(config)) for file in files]
    kept = 0
    seen = 0
    wanted = int(quota * SPARE) + 16
    while kept < quota and seen < sum(sizes):
        drawn = draw_rows(sizes, wanted, config.seed, name)
        rows = _rows_at(config, files, drawn[seen:])
        for place in drawn[seen:]:
            row = rows.pop(place, None)
            if row is None or kept == quota:
                continue
            record = cleaner.read(row, name, lambda found: to_record(found, part.row, part=name))
            if record is not None and cleaner.is_clean(record):
                kept += 1
                yield cleaner.keep(record)
        seen, wanted = len(drawn), wanted * 2
    if kept < quota:
        raise ValueError(
            f"recipe.parts.{name}: found {kept} usable records among {sum(sizes)} rows, expected "
            f"{quota}; lower `count`"
        )


def _rows_at(
    config: PrepareConfig, files: Sequence[Path], places: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Row]:
    """The rows at (file index, row number); each file is read once."""
    found = {}
    for index, file in enumerate(files):
        wanted = {number for at, number in places if at == index}
        if wanted:
            for row in read_rows(file, longest_of(config), wanted):
                found[index, row.number] = row
    return found
