"""Files and directories that are whole or absent: made under another name, then renamed.

The other name is hidden and lies beside the final one, `.NAME.RANDOM.tmp`. After an error it is
deleted; what a killed writer left, `remove_torn` deletes. `sync=False` does not wait for the disk,
which takes a minute on a busy one: for what need not survive a crash of the machine.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomic(file: Path, text: str, *, sync: bool = True) -> None:
    """Write so that a reader sees the old content or the new, never a part."""
    with atomic_file(file, sync=sync) as made:
        made.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(target: Path, *, sync: bool = True) -> Iterator[Path]:
    """Where to write what becomes the file `target`, replacing it, when the block ends well."""
    made = _beside(target)
    try:
        yield made
        if sync:
            _sync_file(made)
        made.replace(target)
    except BaseException:
        with suppress(OSError):
            made.unlink()
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file, or a copy of it where the file system has no hard links."""
    with atomic_file(target, sync=False) as made:
        try:
            os.link(source, made)
        except OSError:
            shutil.copyfile(source, made)


@contextmanager
def atomic_files(folder: Path, *, sync: bool = True) -> Iterator[Path]:
    """A directory whose files replace those of `folder` when the block ends well: all, or none."""
    folder.mkdir(parents=True, exist_ok=True)
    made = _beside(folder / "files")
    made.mkdir()
    try:
        yield made
        if sync:
            sync_tree(made)
        for file in made.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def atomic_directory(target: Path, *, replace: bool = False, sync: bool = True) -> Iterator[Path]:
    """A new directory that becomes `target` when the block ends well, and is deleted otherwise.

    Its files are opened to those who may read the directory. Raises `ValueError` where `target` is
    there, and not an empty directory, unless it may be replaced.
    """
    if not replace and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target}: already exists; delete it or choose another directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    made, aside = _beside(target), _beside(target)
    made.mkdir()
    try:
        yield made
        _open_to_readers(made)
        if sync:
            sync_tree(made)
        if replace and target.exists():
            target.rename(aside)
        made.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def remove_torn(directory: Path, name: str = "*") -> None:
    """Delete what killed writers of `name` left in `directory`; nobody else may be writing it."""
    for left in directory.glob(f".{name}.*.tmp"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def sync_tree(directory: Path) -> dict[str, int]:
    """Flush every file below `directory` to disk; relative name -> size in bytes."""
    sizes: dict[str, int] = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            _sync_file(file)
            sizes[str(file.relative_to(directory))] = file.stat().st_size
    return sizes


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def _sync_file(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _open_to_readers(directory: Path) -> None:
    """Some libraries make files that only their owner may read, whatever the umask says."""
    readers = directory.stat().st_mode & 0o444
    for file in directory.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode | readers)
