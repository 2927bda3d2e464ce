import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megadistill.convert.hf_files import (
    SafetensorsReader,
    writing_model,
)
from megadistill.convert.weight_files import INDEX_FILE, SINGLE_FILE
from megadistill.resolve import resolve
from tests.convert.conftest import assert_same, read_all

TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "b": torch.arange(4, dtype=torch.float32),
    "c": torch.ones(5, dtype=torch.float16),
    "d": torch.zeros(0, 7, dtype=torch.float16),
}


def write(directory: Path, max_shard_bytes: float = 5e9) -> Path:
    with writing_model(directory, max_shard_bytes) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    return directory


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    directory = write(tmp_path / "model")
    assert [file.name for file in directory.iterdir()] == ["model.safetensors"]
    assert_same(load_file(directory / SINGLE_FILE), TENSORS)
    assert_same(read_all(directory), TENSORS)


def test_shards_are_numbered_and_indexed(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", max_shard_bytes=20)
    index = json.loads((directory / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["weight_map"] == {
        "a": "model-00001-of-00003.safetensors",
        "b": "model-00002-of-00003.safetensors",
        "c": "model-00003-of-00003.safetensors",
        "d": "model-00003-of-00003.safetensors",
    }
    assert_same(read_all(directory), TENSORS)


def test_a_full_header_starts_a_new_shard(tmp_path: Path) -> None:
    names = [f"{'x' * 900}{number}" for number in range(300)]
    with writing_model(tmp_path / "model") as writer:
        for number, name in enumerate(names):
            writer.write(name, torch.tensor([number]))
    found = read_all(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3
    assert [int(found[name]) for name in names] == list(range(300))


def test_views_and_odd_offsets_are_written_right(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    expected = {"bytes": torch.tensor([1, 2, 3], dtype=torch.uint8), "view": base.T[1:]}
    with writing_model(tmp_path / "model") as writer:
        for name, tensor in expected.items():
            writer.write(name, tensor)
    assert_same(read_all(tmp_path / "model"), expected)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with writing_model(tmp_path / "model") as writer:
            writer.write("a", TENSORS["a"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_model_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "model")
    with pytest.raises(ValueError, match="already exists; delete it or choose another"):
        write(tmp_path / "model")


def test_metadata_is_copied_with_the_right_dtype(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"torch_dtype": "float32", "model_type": "llama"}')
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("template")
    (source / "optimizer.bin").write_text("not this")
    with writing_model(tmp_path / "model") as writer:
        writer.write("a", TENSORS["a"])
        writer.copy_metadata(source)
    found = {file.name for file in (tmp_path / "model").iterdir()}
    assert found == {"config.json", "tokenizer.json", "chat_template.jinja", SINGLE_FILE}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config == {"torch_dtype": "bfloat16", "model_type": "llama"}


def test_the_dtype_is_read_without_data(tmp_path: Path) -> None:
    reader = SafetensorsReader(write(tmp_path / "model", max_shard_bytes=20))
    assert [reader.dtype(name) for name in TENSORS] == [t.dtype for t in TENSORS.values()]


def test_readers_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"found neither {INDEX_FILE} nor"):
        SafetensorsReader(tmp_path)
    directory = write(tmp_path / "model", max_shard_bytes=20)
    with pytest.raises(ValueError, match="no tensor 'z' among 4"):
        SafetensorsReader(directory).read("z")
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names missing files \['model-00002-of-00003"):
        SafetensorsReader(directory)


def test_a_file_that_is_cut_or_only_a_pointer_is_named(tmp_path: Path) -> None:
    with writing_model(tmp_path / "model") as writer:
        writer.write("weight", torch.zeros(8, 8))
    file = tmp_path / "model" / SINGLE_FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=rf"{file}: found no whole safetensors file .*download it"):
        SafetensorsReader(tmp_path / "model")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=rf"{file}: found a Git LFS pointer, expected weights"):
        SafetensorsReader(tmp_path / "model")


def test_an_index_may_not_lead_out_of_the_directory(tmp_path: Path) -> None:
    write(tmp_path / "other")
    (tmp_path / "model").mkdir()
    index = {"weight_map": {"a": f"../other/{SINGLE_FILE}"}}
    (tmp_path / "model" / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected plain file names"):
        SafetensorsReader(tmp_path / "model")


def test_models_are_found_by_path_and_by_cache_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGADISTILL_CACHE", str(tmp_path))
    (tmp_path / "small").mkdir()
    assert resolve("model", str(tmp_path / "small")) == tmp_path / "small"
    assert resolve("model", "cache:small") == tmp_path / "small"


def test_models_that_are_not_here_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: found .*absent', which does not exist"):
        resolve("model", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="run `hf download no-such-org/no-such-model`"):
        resolve("model", "no-such-org/no-such-model")
