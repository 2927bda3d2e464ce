"""Records drawn at random from each part of a mixture, as many as the recipe says."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from megadistill.config import PrepareConfig
from megadistill.config.prepare import MixtureConfig
from megadistill.data.files import Longest, Row, count_rows, read_all, read_rows
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
    longest = longest_of(config)
    for name, quota in quotas(recipe).items():
        part = recipe.parts[name]
        files = files_of(part.source)
        if quota is None:
            rows = read_all(files, longest)
        else:
            rows = _draw(files, longest, quota, (config.seed, name))
        kept = 0
        while kept != quota and (row := next(rows, None)):
            record = cleaner.read(row, part.row, name)
            if record is not None and cleaner.keeps(record):
                kept += 1
                yield record
        if quota is not None and kept < quota:
            raise ValueError(
                f"recipe.parts.{name}: found {kept} usable records among "
                f"{cleaner.counts[name].read} rows, expected {quota}; lower `count`"
            )


def _draw(
    files: Sequence[Path], longest: Longest, quota: int, salt: tuple[int, str]
) -> Iterator[Row]:
    """All rows in random order; more are read as long as too few of those read were clean."""
    sizes = [count_rows(file, longest) for file in files]
    seen, wanted = 0, int(quota * SPARE) + 16
    while seen < sum(sizes):
        places = draw_rows(sizes, wanted, *salt)[seen:]
        rows = _rows_at(files, longest, places)
        yield from (rows.pop(place) for place in places if place in rows)
        seen, wanted = seen + len(places), wanted * 2


def _rows_at(
    files: Sequence[Path], longest: Longest, places: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Row]:
    """The rows at (file index, row number); each file is read once."""
    found = {}
    for index, file in enumerate(files):
        wanted = {number for at, number in places if at == index}
        if wanted:
            for row in read_rows(file, longest, wanted):
                found[index, row.number] = row
    return found
