"""Weights as safetensors on a path that trainer and engines share."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from megadistill.atomic import remove_torn
from megadistill.convert.hf_files import writing_model
from megadistill.convert.weight_files import weight_map
from megadistill.publish.checksum import Checksum

SHARD_BYTES = 1 << 30
"""Most bytes of a file; one larger tensor has a file of its own."""

KEEP = 2
"""Versions kept on disk: the newest, and the one that an engine may still be reading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One version of the weights, whole on disk."""

    files: tuple[Path, ...]
    checksum: str


def published_at(directory: Path) -> Published:
    """The files of a Hugging Face directory that hold its weights, as they lie there.

    Reads every byte once for the checksum. Raises `ValueError` when there is no such file.
    """
    names = sorted(set(weight_map(directory).values()))
    files = tuple(directory.absolute() / name for name in names)
    total = Checksum()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                total.add(name, tensors.get_tensor(name))
    return Published(files=files, checksum=total.hexdigest())


def publish_files(
    tensors: Iterable[tuple[str, torch.Tensor]],
    directory: Path,
    version: int,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Published:
    """Write `tensors` to `directory/version-NNNNNN/` and delete all but the newest two versions.

    The tensors are consumed one by one, and none is kept; files have at most `shard_bytes` or one
    larger tensor. The version appears by a rename, so that it is whole
    or absent; publishing a version again (after a resume) replaces it. Raises `ValueError`
    when there is no tensor at all. One process publishes into a directory at a time; what a
    killed one left half-written is cleared first.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    remove_torn(directory)
    final, total, is_empty = directory / f"version-{version:06d}", Checksum(), True
    # Nothing is flushed to disk: a crash makes the trainer publish again, and a shared
    # filesystem shows a closed file to other nodes without it.
    with writing_model(final, shard_bytes, replace=True, sync=False) as writer:
        for name, tensor in tensors:
            total.add(name, tensor)
            writer.write(name, tensor)
            is_empty = False
        if is_empty:
            raise ValueError(f"version {version}: found no tensors to publish, expected a model")
    _drop_old(directory, version)
    return Published(files=tuple(sorted(final.glob("*.safetensors"))), checksum=total.hexdigest())


def _drop_old(directory: Path, version: int) -> None:
    """Keep the newest two versions up to this one; those above it belong to a run since undone."""
    found = sorted(
        (int(path.name.removeprefix("version-")), path) for path in directory.glob("version-*")
    )
    past = [path for number, path in found if number <= version]
    undone = [path for number, path in found if number > version]
    for path in [*past[:-KEEP], *undone]:
        shutil.rmtree(path, ignore_errors=True)
