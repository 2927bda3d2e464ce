"""Whole models between a Hugging Face directory and a Megatron distributed checkpoint."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import DownloadColumn, Progress

from megadistill.atomic import atomic_directory
from megadistill.convert.checkpoint import CheckpointReader, write_checkpoint
from megadistill.convert.families import ModelSpec, read_spec
from megadistill.convert.hf_files import (
    SafetensorsReader,
    copy_companions,
    writing_model,
)
from megadistill.convert.mapping import Entry, check_names, entries, to_hf
from megadistill.resolve import resolve

HF_DIR = "hf"
"""Subdirectory of a converted checkpoint that keeps `config.json` and the tokenizer."""


def hf_to_megatron(
    src: str | Path, dst: str | Path, *, max_file_bytes: float = 5e9, progress: bool = True
) -> Path:
    """Convert the model directory or hub name `src` to a Megatron checkpoint directory `dst`.

    Megatron-Core loads `dst` at any parallel sizes. `dst` is whole or absent; memory stays at a
    few tensors. Raises `ValueError` for a model that we do not support, or when `dst` exists.
    """
    reader = SafetensorsReader(src)
    spec = read_spec(reader.directory)
    check_names(spec, reader.names)
    dst = Path(dst).absolute()
    with atomic_directory(dst) as made:
        (made / HF_DIR).mkdir()
        shutil.copyfile(reader.directory / "config.json", made / HF_DIR / "config.json")
        copy_companions(reader.directory, made / HF_DIR)
        total = sum(_num_bytes(spec, entry, reader.dtype(entry.hf[0])) for entry in entries(spec))
        with _bar(f"{spec.family} to Megatron", total, shown=progress) as advance:
            write_checkpoint(made, spec, reader, max_file_bytes=max_file_bytes, advance=advance)
    return dst


def megatron_to_hf(
    src: str | Path,
    dst: str | Path,
    *,
    model: str | Path | None = None,
    max_shard_bytes: float = 5e9,
    progress: bool = True,
) -> Path:
    """Convert the Megatron checkpoint `src`, of any parallel sizes, to a model directory `dst`.

    Configuration and tokenizer come from `model` (a directory or hub name), by default from what
    `hf_to_megatron` left in `src`. `dst` is whole or absent; memory stays at `max_shard_bytes`.
    Raises `ValueError` when the checkpoint does not fit the configuration, or when `dst` exists.
    """
    if model is None and not (Path(src) / HF_DIR).is_dir():
        raise ValueError(
            f"{src}: has no {HF_DIR}/ with a config.json; "
            "name the Hugging Face model that it was trained from"
        )
    source = resolve("model", str(model or Path(src) / HF_DIR))
    spec = read_spec(source)
    reader = CheckpointReader(src)
    total = sum(_num_bytes(spec, entry, reader.dtype(entry.megatron)) for entry in entries(spec))
    with (
        writing_model(dst, max_shard_bytes) as writer,
        _bar(f"{spec.family} to Hugging Face", total, shown=progress) as advance,
    ):
        for entry in entries(spec):
            full = reader.read(entry.megatron)
            _check_shape(spec, entry, full)
            for name, tensor in to_hf(spec, entry.megatron, full):
                writer.write(name, tensor)
                advance(tensor.nbytes)
        writer.copy_metadata(source)
    return Path(dst).absolute()


def _check_shape(spec: ModelSpec, entry: Entry, full: torch.Tensor) -> None:
    """Raise `ValueError` unless the shape is the spec's, but for rows that pad the vocabulary."""
    expected, found = entry.shape(spec), tuple(full.shape)
    padded = entry.dims[0] == "V" and found[0] >= expected[0] and found[1:] == expected[1:]
    if found != expected and not padded:
        raise ValueError(f"{entry.megatron}: found {found}, expected {expected} by config.json")


def _num_bytes(spec: ModelSpec, entry: Entry, dtype: torch.dtype) -> int:
    return torch.Size(entry.shape(spec)).numel() * dtype.itemsize


@contextmanager
def _bar(title: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` bytes; yields the function that advances it."""
    columns = (*Progress.get_default_columns(), DownloadColumn())
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task(title, total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)
