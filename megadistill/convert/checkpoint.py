"""Megatron's distributed checkpoints (`torch_dist`) without Megatron: lazily written and read.

The format is `torch.distributed.checkpoint`'s, with Megatron-Core's keys: every parameter is one
global tensor, those of the layers stacked to `[num_layers, ...]` under a name without the layer's
number. Megatron-Core loads it at any tensor- and pipeline-parallel size; the vocabulary is stored
without padding, which its loader adds.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megadistill.convert.families import ModelSpec
from megadistill.convert.hf_files import SafetensorsReader
from megadistill.convert.mapping import Entry, entries, merged
from megadistill.convert.safe_metadata import SafeFileSystemReader

_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What Megatron-Core reads in `metadata.json` to recognise the format."""
_COMMON = {"content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": False}}
"""Content of `common.pt`: how the keys were made, for loaders that ask."""
_LAYERS = "decoder.layers."
_STATEFUL = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_STATEFUL_QK_NORM = ("self_attention.q_layernorm", "self_attention.k_layernorm")
"""Modules of a layer that may ask for an FP8 state on loading; a fresh one is stored as `None`."""
_EMPTY_STATE_BYTES = 2048
"""More than a pickled `[None]` takes; only used to size the plan."""


def write_checkpoint(
    directory: Path,
    spec: ModelSpec,
    reader: SafetensorsReader,
    *,
    max_file_bytes: float = 5e9,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write the model that `reader` reads into `directory`, one tensor in memory at a time.

    `advance` is told the bytes of each tensor. Raises `ValueError` for a tensor of wrong shape.
    """
    sources: dict[MetadataIndex, Entry] = {}
    items: list[WriteItem] = []
    dtypes = _stored_dtypes(spec, reader)
    for entry in entries(spec):
        item = _tensor_item(spec, entry, dtypes[_stacked(entry.megatron)[0]])
        sources[item.index] = entry
        items.append(item)

    def resolve(item: WriteItem) -> torch.Tensor:
        assert item.tensor_data is not None
        full = merged(spec, sources[item.index], reader).to(item.tensor_data.properties.dtype)
        advance(full.nbytes)
        return full.reshape(item.tensor_data.chunk.sizes)

    plans = [SavePlan(group) for group in _files([*items, *_states(spec)], max_file_bytes)]
    plans, metadata = create_default_global_save_plan(plans)
    writer = FileSystemWriter(directory, overwrite=False)
    writer.set_up_storage_writer(is_coordinator=True)
    planner = _LazyPlanner(resolve)
    results = [
        writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(plans)
    ]
    writer.finish(metadata, results)
    torch.save(_COMMON, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(_CONFIG), encoding="utf-8")


def _stored_dtypes(spec: ModelSpec, reader: SafetensorsReader) -> dict[str, torch.dtype]:
    """Key of each tensor of a checkpoint -> the dtype that holds all its parts, of every layer."""
    dtypes: dict[str, torch.dtype] = {}
    for entry in entries(spec):
        key, _ = _stacked(entry.megatron)
        for found in map(reader.dtype, entry.hf):
            known = dtypes.get(key, found)
            dtypes[key] = known if known == found else torch.promote_types(known, found)
    return dtypes


class CheckpointReader:
    """Reads full tensors of a distributed checkpoint by Megatron name, one at a time."""

    def __init__(self, directory: str | Path) -> None:
        """Raises `ValueError` when `directory` is no such checkpoint."""
        self.directory = Path(directory)
        if not (self.directory / ".metadata").exists():
            raise ValueError(
                f"{directory}: no .metadata, expected a directory that Megatron-Core's "
                "dist_checkpointing wrote (often `iter_0000010` below the one you gave)"
            )
        self._storage = SafeFileSystemReader(self.directory)
        metadata = self._storage.read_metadata()
        self._storage.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            key: tensor
            for key, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the parameter called `name`, as in `read`."""
        return self._locate(name)[1].properties.dtype

    def read(self, name: str) -> torch.Tensor:
        """The full tensor of a parameter, named with its global layer number.

        Finds it stacked over the layers or alone. Raises `ValueError` when it is missing or torn.
        """
        key, stored, layer = self._locate(name)
        sizes = stored.size if layer is None else torch.Size([1, *stored.size[1:]])
        offsets = torch.Size([layer or 0, *[0] * (len(sizes) - 1)])
        target = torch.empty(sizes, dtype=stored.properties.dtype)
        region = ChunkStorageMetadata(offsets=offsets, sizes=sizes)
        items = create_read_items_for_chunk_list(key, stored, [region])
        found = sum(item.lengths.numel() for item in items)
        if found != target.numel():
            raise ValueError(
                f"{self.directory}: {name}: found {found} elements, expected {target.numel()}"
            )
        self._storage.read_data(LoadPlan(items), _IntoTensor(target)).wait()
        return target if layer is None else target[0]

    def _locate(self, name: str) -> tuple[str, TensorStorageMetadata, int | None]:
        """Key, description and place in the stack (absent: it is not stacked) of a parameter."""
        if name in self._tensors:
            return name, self._tensors[name], None
        key, layer = _stacked(name)
        stored = self._tensors.get(key)
        if stored is None or layer is None or layer >= stored.size[0]:
            raise ValueError(
                f"{self.directory}: no parameter {name} among {len(self._tensors)} tensors; "
                "was it trained with another model configuration?"
            )
        return key, stored, layer


class _LazyPlanner(DefaultSavePlanner):
    """Makes each tensor when the storage writer asks for it."""

    def __init__(self, resolve: Callable[[WriteItem], torch.Tensor]) -> None:
        super().__init__()
        self._resolve = resolve

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type != WriteItemType.BYTE_IO:
            return self._resolve(write_item)
        stream = io.BytesIO()
        torch.save([None], stream)
        return stream


class _IntoTensor(DefaultLoadPlanner):
    """Lets the storage reader copy pieces into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        piece = self._target
        borders = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        for dim, (start, length) in enumerate(borders):
            piece = piece.narrow(dim, start, length)
        return piece

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: `tensor` is a view of the target."""


def _stacked(name: str) -> tuple[str, int | None]:
    """Key of the global tensor that holds a parameter, and the layer's place in it."""
    if not name.startswith(_LAYERS):
        return name, None
    number, rest = name.removeprefix(_LAYERS).split(".", 1)
    return _LAYERS + rest, int(number)


def _tensor_item(spec: ModelSpec, entry: Entry, dtype: torch.dtype) -> WriteItem:
    """The plan to write one parameter: a slice of the stack, or a tensor of its own."""
    key, layer = _stacked(entry.megatron)
    shape = entry.shape(spec)
    stack = () if layer is None else (spec.num_layers,)
    sizes = shape if layer is None else (1, *shape)
    offsets = (layer or 0, *[0] * (len(sizes) - 1))
    chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
    return WriteItem(
        index=MetadataIndex(key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=chunk,
            properties=TensorProperties(dtype=dtype),
            size=torch.Size((*stack, *shape)),
        ),
    )


def _states(spec: ModelSpec) -> Iterator[WriteItem]:
    """Empty FP8 states under the keys Megatron-Core gives its per-module objects."""
    modules = (*_STATEFUL, *_STATEFUL_QK_NORM) if spec.qk_norm else _STATEFUL
    for layer in range(spec.num_layers):
        for module in modules:
            yield _state_item(f"{_LAYERS}{module}", layer, spec.num_layers)
    yield _state_item("decoder.final_layernorm", 0, 1)


def _state_item(module: str, index: int, count: int) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(f"{module}._extra_state/shard_{index}_{count}"),
        type=WriteItemType.BYTE_IO,
        bytes_io_data=BytesIOWriteData(nbytes=_EMPTY_STATE_BYTES),
    )


def _files(items: Sequence[WriteItem], max_bytes: float) -> list[list[WriteItem]]:
    """Deal the items, in order, to files of at most `max_bytes` or one larger tensor."""
    files: list[list[WriteItem]] = [[]]
    filled = 0
    for item in items:
        num_bytes = _num_bytes(item)
        if files[-1] and filled + num_bytes > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(item)
        filled += num_bytes
    return files


def _num_bytes(item: WriteItem) -> int:
    if item.tensor_data is None:
        return _EMPTY_STATE_BYTES
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
