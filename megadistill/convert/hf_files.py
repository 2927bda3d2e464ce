"""Hugging Face model directories: find one, read its tensors one by one, write one in shards."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megadistill.atomic import atomic_directory
from megadistill.convert.weight_files import INDEX_FILE, SINGLE_FILE, open_weights, weight_map
from megadistill.resolve import read_settings, resolve

_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""What belongs to a model beside its weights and `config.json`; its terms go with it, too."""


class SafetensorsReader:
    """Reads tensors of a model directory by name; one weights file is mapped at a time.

    A tensor is a view of the mapped file: copy it to keep it past the next call.
    Calling the reader is the same as `read`, so that it serves as `mapping.Read`.
    """

    def __init__(self, model: str | Path) -> None:
        """`model` as a configuration names it. Raises `ValueError` when it holds no safetensors."""
        self.directory = resolve("model", str(model))
        self._files = weight_map(self.directory)
        self._open_name: str | None = None
        self._open: Any = None  # a `safe_open`, which has no type annotations

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`. Raises `ValueError` when the model has none."""
        tensor: torch.Tensor = self._file_of(name).get_tensor(name)
        return tensor

    __call__ = read

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading its data."""
        return tuple(self._file_of(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype, without reading its data."""
        piece = self._file_of(name).get_slice(name)
        sample: torch.Tensor = piece[...] if not piece.get_shape() else piece[:0]
        return sample.dtype

    def _file_of(self, name: str) -> Any:
        if name not in self._files:
            raise ValueError(f"{self.directory}: no tensor {name!r} among {len(self._files)}")
        file = self._files[name]
        if self._open is None or file != self._open_name:
            self._open = open_weights(self.directory / file, "pt")
            self._open_name = file
        return self._open


@contextmanager
def writing_model(
    out_dir: str | Path,
    max_shard_bytes: float = 5e9,
    *,
    replace: bool = False,
    sync: bool = True,
) -> Iterator["SafetensorsWriter"]:
    """A new model directory, whole when the block ends well, otherwise absent; as `atomic_directory`."""
    with atomic_directory(Path(out_dir).absolute(), replace=replace, sync=sync) as made:
        writer = SafetensorsWriter(made, max_shard_bytes)
        try:
            yield writer
        finally:
            writer.close()
        writer.name_shards()


class SafetensorsWriter:
    """Streams tensors into a Hugging Face model directory; no tensor is kept in memory."""

    def __init__(self, directory: Path, max_shard_bytes: float) -> None:
        self._directory = directory
        self._max_shard_bytes = max_shard_bytes
        self._shards: list[_Shard] = []
        self._dtypes: Counter[torch.dtype] = Counter()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Add one tensor, from any device; it may be a view. A shard holds at least one.

        Raises `ValueError` for a type that is not written.
        """
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(
                f"{name}: found the type {tensor.dtype}, expected one of {sorted(map(str, _DTYPE_NAMES))}"
            )
        if not self._shards or not self._shards[-1].has_room(name, tensor, self._max_shard_bytes):
            self.close()
            self._shards.append(_Shard(self._directory / f"shard-{len(self._shards)}"))
        self._shards[-1].write(name, tensor)
        self._dtypes[tensor.dtype] += tensor.numel()

    def copy_metadata(self, source: str | Path) -> None:
        """Copy `config.json`, tokenizer and generation settings of the model directory `source`.

        Call it after the last `write`: the dtype in `config.json` becomes that of most elements.
        """
        source = Path(source)
        config = read_settings(source / "config.json")
        for dtype, _ in self._dtypes.most_common(1):
            set_dtype(config, dtype)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (self._directory / "config.json").write_text(text, encoding="utf-8")
        copy_companions(source, self._directory)

    def close(self) -> None:
        """Complete the shard that is being written."""
        for shard in self._shards[-1:]:
            shard.close()

    def name_shards(self) -> None:
        """Give the closed shards their final names, and write the index."""
        count = len(self._shards)
        files: dict[str, str] = {}
        for number, shard in enumerate(self._shards, start=1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE_FILE
            shard.path.rename(self._directory / file)
            files.update(dict.fromkeys(shard.header, file))
        if count > 1:
            total = sum(shard.num_bytes for shard in self._shards)
            index = {"metadata": {"total_size": total}, "weight_map": files}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._directory / INDEX_FILE).write_text(text, encoding="utf-8")


class _Shard:
    """One safetensors file, written front to back.

    Its header tells where each tensor lies, which is known last, so that room is kept for it;
    the format allows the spaces that fill what remains.
    """

    header_bytes = 128 * 1024 - 8
    bytes_per_name = 200
    """More than one tensor's line in the header takes beside its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self.header: dict[str, dict[str, object]] = {}
        self._room = self.header_bytes - self.bytes_per_name
        self._stream = path.open("wb")
        self._stream.seek(8 + self.header_bytes)

    def has_room(self, name: str, tensor: torch.Tensor, max_bytes: float) -> bool:
        """Whether `tensor` may follow: in size, in the header, and by its alignment."""
        return (
            self.num_bytes + tensor.nbytes <= max_bytes
            and self._room >= len(name) + self.bytes_per_name
            and self.num_bytes % tensor.itemsize == 0
        )

    def write(self, name: str, tensor: torch.Tensor) -> None:
        assert name not in self.header, f"{name} was written twice"
        data = tensor.detach().cpu().contiguous()
        end = self.num_bytes + data.nbytes
        self.header[name] = {
            "dtype": _DTYPE_NAMES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [self.num_bytes, end],
        }
        self._stream.write(data.flatten().view(torch.uint8).numpy().data)
        self.num_bytes = end
        self._room -= len(name) + self.bytes_per_name

    def close(self) -> None:
        """Write the header into the room that was kept."""
        header = {"__metadata__": {"format": "pt"}, **self.header}
        text = json.dumps(header, separators=(",", ":")).encode().ljust(self.header_bytes)
        self._stream.seek(0)
        self._stream.write(len(text).to_bytes(8, "little") + text)
        self._stream.close()


_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def set_dtype(config: dict[str, object], dtype: torch.dtype) -> None:
    """Record `dtype` under the key the configuration already uses, `dtype` or `torch_dtype`."""
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation settings, those that exist."""
    for pattern in _COPIED:
        for file in source.glob(pattern):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
