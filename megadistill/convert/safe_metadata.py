"""The `.metadata` file of a distributed checkpoint, unpickled without running what it says."""

import pathlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner


class SafeFileSystemReader(filesystem.FileSystemReader):
    """Reads a checkpoint from somebody else: its metadata may hold plain descriptions only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """The checkpoint's description. Raises `ValueError` for anything that is not one."""
        file = Path(self.path) / ".metadata"
        with file.open("rb") as stream:
            found = _MetadataUnpickler(stream, file).load()
        if not isinstance(found, metadata.Metadata):
            raise ValueError(f"{file}: found {type(found).__name__}, expected Metadata")
        for info in found.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise ValueError(f"{file}: found {info.relative_path!r}, expected a plain name")
        return found


class _Opaque:
    """Stands for an object of Megatron's own that we have no use for."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the classes that describe a checkpoint, and nothing else."""

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        super().__init__(stream)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        """The class or constant called `name`; Any because a pickle may name either."""
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(
            found := vars(torch).get(name), torch.dtype | torch.layout
        ):
            return found
        if module.startswith("megatron.core.dist_checkpointing."):
            return _Opaque
        raise ValueError(
            f"{self._file}: refusing to load {module}.{name}, which has no place in a "
            "checkpoint's metadata; do not trust this checkpoint"
        )


_CLASSES = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    filesystem._StoragePrefix,
    planner.BytesIOWriteData,
    planner.SavePlan,
    planner.TensorWriteData,
    planner.WriteItem,
    planner.WriteItemType,
)
_ALLOWED: Mapping[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__qualname__): kind for kind in _CLASSES},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib", "PurePosixPath"): pathlib.PurePosixPath,
}
