import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadistill.convert.weight_files import INDEX_FILE
from megadistill.publish.checksum import checksum
from megadistill.publish.files import publish_files, published_at


def tensors(seed: int = 0, count: int = 5) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(f"layer.{index}", torch.randn(8, 4, generator=generator)) for index in range(count)]


def test_what_was_published_can_be_read_back(tmp_path: Path) -> None:
    published = publish_files(tensors(), tmp_path / "weights", 3)
    (file,) = published.files
    found = load_file(file)
    assert file.parent.name == "version-000003"
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in tensors()
    }
    assert published.checksum == checksum(found.items())


def test_shards_are_bounded_and_the_checksum_is_that_of_the_whole(tmp_path: Path) -> None:
    published = publish_files(tensors(), tmp_path, 1, shard_bytes=2 * 8 * 4 * 4)
    sizes = [len(load_file(file)) for file in published.files]
    assert sizes == [2, 2, 1]
    assert published.checksum == checksum(tensors())


def test_a_tensor_larger_than_a_shard_is_a_shard_of_its_own(tmp_path: Path) -> None:
    published = publish_files(tensors(count=2), tmp_path, 1, shard_bytes=1)
    assert [len(load_file(file)) for file in published.files] == [1, 1]


def test_views_and_transposed_tensors_are_written_whole(tmp_path: Path) -> None:
    fused = torch.randn(6, 4)
    parts = [("q", fused[:2]), ("k", fused[2:4].t()), ("v", fused[4:])]
    (file,) = publish_files(parts, tmp_path, 1).files
    found = load_file(file)
    assert all(torch.equal(found[name], part) for name, part in parts)


def test_only_the_newest_two_versions_stay(tmp_path: Path) -> None:
    for version in range(5):
        publish_files(tensors(version), tmp_path, version)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version-000003", "version-000004"]


def test_a_resumed_run_replaces_a_version_and_drops_those_it_undid(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        publish_files(tensors(version), tmp_path, version)
    (file,) = publish_files(tensors(9), tmp_path, 2).files
    assert torch.equal(load_file(file)["layer.0"], tensors(9)[0][1])
    assert [path.name for path in tmp_path.iterdir()] == ["version-000002"]


def test_a_failure_midway_leaves_the_old_versions_and_nothing_else(tmp_path: Path) -> None:
    publish_files(tensors(), tmp_path, 1)

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from tensors()
        raise RuntimeError("rank lost")

    with pytest.raises(RuntimeError, match="rank lost"):
        publish_files(broken(), tmp_path, 2, shard_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["version-000001"]


def test_what_a_killed_publisher_left_goes_with_the_next_version(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib, torch\n"
        "from megadistill.publish.files import publish_files\n"
        "def killed():\n"
        "    yield 'a', torch.zeros(8)\n"
        "    yield 'b', torch.zeros(8)\n"
        "    os._exit(9)\n"
        "publish_files(killed(), pathlib.Path(sys.argv[1]), 2, shard_bytes=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert done.returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".version-000002.")
    publish_files(tensors(), tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["version-000003"]


def test_publishing_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tensors"):
        publish_files([], tmp_path, 1)


def test_a_model_directory_is_published_where_it_lies(tmp_path: Path) -> None:
    save_file(dict(tensors()[:2]), tmp_path / "model-1.safetensors")
    save_file(dict(tensors()[2:]), tmp_path / "model-2.safetensors")
    save_file(dict(tensors()), tmp_path / "consolidated.safetensors")  # the same once more
    files = {
        name: f"model-{1 + (index >= 2)}.safetensors" for index, (name, _) in enumerate(tensors())
    }
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": files}))
    published = published_at(tmp_path)
    assert [file.name for file in published.files] == ["model-1.safetensors", "model-2.safetensors"]
    assert published.checksum == checksum(tensors())


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found neither"):
        published_at(tmp_path)
