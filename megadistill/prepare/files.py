"""The files of a recipe: a user's own, or the hub's in the Hugging Face cache."""

from collections.abc import Iterable
from pathlib import Path

from megadistill.config.prepare import DataFilesConfig, PrepareConfig
from megadistill.config.rows import Location
from megadistill.data.files import Longest
from megadistill.data.files import files_of as files_at
from megadistill.resolve import resolve


def files_of(source: DataFilesConfig, *, download: bool = False) -> list[Path]:
    """The source's files in order; those of the hub in its cache, into which `download` brings them.

    Raises `ValueError` that says what to do when one is missing.
    """
    if source.hub is None:
        return _matching(source.files)
    wanted = [*source.files, "README.md", "LICENSE*"]
    try:
        folder = resolve(
            "dataset",
            source.hub,
            key="hub",
            revision=source.revision,
            files=wanted,
            download=download,
        )
        return _matching([str(folder / pattern) for pattern in source.files])
    except ValueError as error:
        raise ValueError(f"{error} (`megadistill prepare CONFIG --download-only`)") from None


def _matching(patterns: Iterable[str]) -> list[Path]:
    found = (files_at(Location("data", pattern), key="files") for pattern in patterns)
    return [file for files in found for file in files]


def longest_of(config: PrepareConfig) -> Longest:
    """The longest line that may be in an input file."""
    return Longest(config.max_line_mib << 20, "max_line_mib")
