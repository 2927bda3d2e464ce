import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.atomic import (
    atomic_directory,
    atomic_files,
    remove_torn,
    sync_tree,
    write_atomic,
)


def test_a_write_replaces_the_content_and_leaves_no_other_file(tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    write_atomic(file, "old")
    write_atomic(file, "néw")
    assert file.read_text(encoding="utf-8") == "néw"
    assert list(tmp_path.iterdir()) == [file]


def test_a_reader_keeps_the_old_content_whole(tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    write_atomic(file, "old" * 1000)
    with file.open() as reader:
        write_atomic(file, "new")
        assert reader.read() == "old" * 1000


@pytest.mark.parametrize("sync", [True, False])
def test_a_write_that_fails_leaves_the_old_content_alone(tmp_path: Path, sync: bool) -> None:
    file = tmp_path / "progress.json"
    write_atomic(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(file, "half a text \ud800", sync=sync)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))  # writing fails as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomic(file, "new" * 1000, sync=sync)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_several_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with atomic_files(folder) as made:
        (made / "a").write_text("1")
        (made / "b").write_text("2")
        assert [path for path in folder.iterdir() if path.is_file()] == []
    with pytest.raises(IsADirectoryError), atomic_files(folder) as made:
        made.write_text("3")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "1", "b": "2"}


def test_a_directory_appears_when_it_is_finished(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with atomic_directory(target) as made:
        (made / "weights").write_text("1")
        (made / "weights").chmod(0o600)  # as safetensors makes them
        made.chmod(0o750)
        assert not target.exists()
    assert (target / "weights").read_text() == "1"
    assert stat.S_IMODE((target / "weights").stat().st_mode) == 0o640
    assert list(target.parent.iterdir()) == [target]


def test_a_directory_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), atomic_directory(tmp_path / "model") as made:
        made.write_text("half")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_replaced_only_where_that_is_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with atomic_directory(target) as made:  # an empty one may be filled
        (made / "old").touch()
    with pytest.raises(ValueError, match="already exists; delete it or choose another"):
        atomic_directory(target).__enter__()
    with atomic_directory(target, replace=True) as made:
        (made / "new").touch()
        assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_what_killed_writers_left_can_be_removed_by_name(tmp_path: Path) -> None:
    killed = (
        "import os, pathlib\nfrom megadistill.atomic import atomic_directory, atomic_file\n"
        "here = pathlib.Path()\n"
        "with atomic_directory(here / 'model') as made, atomic_directory(here / 'model-2'):\n"
        "    (made / 'half').touch()\n"
        "    with atomic_file(here / 'file') as file:\n"
        "        file.touch()\n        os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", killed], cwd=tmp_path, check=True)
    remove_torn(tmp_path, "model")
    left = sorted(path.name.rsplit(".", 2)[0] for path in tmp_path.iterdir())
    assert left == [".file", ".model-2"]
    remove_torn(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_recorded_for_every_file_below(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"123")
    (tmp_path / "c").write_bytes(b"")
    assert sync_tree(tmp_path) == {"a/b": 3, "c": 0}
