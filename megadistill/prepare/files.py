"""The files of a recipe: where they lie, and the mirror of the hub."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from megadistill.config import PrepareConfig, resolve_path
from megadistill.config.prepare import DataFilesConfig
from megadistill.data.files import SUFFIXES, Longest


class BadRowError(ValueError):
    """A row that cannot be used; its message is the reason. The reader adds the place."""


def download(config: PrepareConfig, sources: Sequence[DataFilesConfig]) -> list[Path]:
    """Copy what the recipe reads from the hub into the mirror; what is there is not repeated."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow, and only here
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    places = []
    for source in sources:
        if source.hub is None:
            continue
        place = mirror_of(config, source)
        try:
            snapshot_download(
                source.hub,
                repo_type="dataset",
                revision=source.revision,
                allow_patterns=[*source.files, "README.md", "LICENSE*"],
                local_dir=place,
            )
        except GatedRepoError:
            raise ValueError(
                f"{source.hub}: this data set is gated; accept its terms at "
                f"https://huggingface.co/datasets/{source.hub}, then `hf auth login`, then again"
            ) from None
        except RepositoryNotFoundError:
            raise ValueError(f"{source.hub}: the hub has no such data set, or hides it") from None
        except (OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
            raise ValueError(f"{source.hub}: cannot be downloaded: {error}") from error
        places.append(place)
    return places


def mirror_of(config: PrepareConfig, source: DataFilesConfig) -> Path:
    """Where the mirror keeps a data set of the hub."""
    assert source.hub is not None
    return Path(resolve_path(config.mirror)) / source.hub.replace("/", "__")


def files_of(config: PrepareConfig, source: DataFilesConfig) -> list[Path]:
    """The source's files in order. Raises `ValueError` that says what to do when one is missing."""
    found: list[Path] = []
    for pattern in source.files:
        if source.hub is None:
            matches = [Path(resolve_path(pattern))]
        else:
            matches = sorted(mirror_of(config, source).glob(pattern))
        missing = [file for file in matches if not file.is_file()]
        if missing or not matches:
            wanted = missing[0] if missing else f"{mirror_of(config, source)}/{pattern}"
            advice = "set `files`"
            if source.hub is not None:
                advice = "run `megadistill prepare CONFIG --download-only` where there is network"
            raise ValueError(f"{wanted}: no such file; {advice}")
        found += matches
    for file in found:
        if file.suffix not in SUFFIXES:
            raise ValueError(f"{file}: expected one of {', '.join(SUFFIXES)}")
    return found


def longest_of(config: PrepareConfig) -> Longest:
    """The longest line that may be in an input file."""
    return Longest(config.max_line_mib << 20, "max_line_mib")


def hash_file(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
