import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megadistill.convert.checkpoint import CheckpointReader, write_checkpoint
from megadistill.convert.families import read_spec
from megadistill.convert.hf_files import SafetensorsReader
from megadistill.convert.mapping import entries, merged


def write(model_dir: Path, directory: Path, max_file_bytes: float = 5e9) -> Path:
    directory.mkdir()
    reader = SafetensorsReader(model_dir)
    write_checkpoint(directory, read_spec(model_dir), reader, max_file_bytes=max_file_bytes)
    return directory


def test_every_parameter_comes_back(model_dir: Path, tmp_path: Path) -> None:
    spec, hf = read_spec(model_dir), SafetensorsReader(model_dir)
    reader = CheckpointReader(write(model_dir, tmp_path / "checkpoint"))
    for entry in entries(spec):
        found = reader.read(entry.megatron)
        assert found.dtype == reader.dtype(entry.megatron) == torch.bfloat16
        assert torch.equal(found, merged(spec, entry, hf))


def test_layers_are_stacked_under_the_keys_of_megatron(
    models: dict[str, Path], tmp_path: Path
) -> None:
    directory = write(models["qwen2-untied"], tmp_path / "checkpoint")
    described = FileSystemReader(directory).read_metadata().state_dict_metadata
    tensors = {
        k: tuple(t.size) for k, t in described.items() if isinstance(t, TensorStorageMetadata)
    }
    assert tensors == {
        "embedding.word_embeddings.weight": (51, 32),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (4, 32),
        "decoder.layers.self_attention.linear_qkv.weight": (4, 64, 32),
        "decoder.layers.self_attention.linear_qkv.bias": (4, 64),
        "decoder.layers.self_attention.linear_proj.weight": (4, 32, 32),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (4, 32),
        "decoder.layers.mlp.linear_fc1.weight": (4, 96, 32),
        "decoder.layers.mlp.linear_fc2.weight": (4, 32, 48),
        "decoder.final_layernorm.weight": (32,),
        "output_layer.weight": (51, 32),
    }


def test_files_keep_to_their_size(models: dict[str, Path], tmp_path: Path) -> None:
    directory = write(models["llama-tied"], tmp_path / "checkpoint", max_file_bytes=20_000)
    sizes = [file.stat().st_size for file in directory.glob("*.distcp")]
    assert len(sizes) > 3
    assert max(sizes) < 60_000  # a tensor has some 1.2 kB of overhead, a state is nothing else
    for entry in entries(read_spec(models["llama-tied"])):
        CheckpointReader(directory).read(entry.megatron)


def test_missing_parameters_and_checkpoints_are_named(
    models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"no \.metadata, expected a directory that Megatron-Core"):
        CheckpointReader(tmp_path)
    reader = CheckpointReader(write(models["llama-tied"], tmp_path / "checkpoint"))
    for name in ("output_layer.weight", "decoder.layers.4.mlp.linear_fc2.weight"):
        with pytest.raises(ValueError, match=f"no parameter {name} among"):
            reader.read(name)


def test_a_checkpoint_with_a_hole_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    directory = write(models["llama-tied"], tmp_path / "checkpoint")
    metadata = FileSystemReader(directory).read_metadata()
    stack = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    assert isinstance(stack, TensorStorageMetadata)
    del stack.chunks[2]
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    reader = CheckpointReader(directory)
    reader.read("decoder.layers.1.mlp.linear_fc2.weight")
    with pytest.raises(ValueError, match="found 0 elements, expected 1536"):
        reader.read("decoder.layers.2.mlp.linear_fc2.weight")


class _Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self._command,)


def test_metadata_cannot_run_code(tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    attack = Metadata(state_dict_metadata={}, planner_data=_Command(f"touch {trace}"))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(attack))
    with pytest.raises(ValueError, match=r"refusing to load posix.system, .* do not trust"):
        CheckpointReader(tmp_path)
    assert not trace.exists()


def test_metadata_cannot_lead_out_of_the_directory(models: dict[str, Path], tmp_path: Path) -> None:
    directory = write(models["llama-tied"], tmp_path / "checkpoint")
    metadata = FileSystemReader(directory).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere"
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="expected a plain name"):
        CheckpointReader(directory)
