"""The configurations and job scripts that ship with the package: what there is, and copies of it.

`configs` and `slurm` of this folder are the repository's own folders, by a link in a checkout and as files
in an installed package. A copy keeps their layout, so that what files say of one another holds there too.
"""

import difflib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
_PATH = re.compile(r"[\w.][\w.-]*(?:/[\w.-]+)*")
_SCHEMA = re.compile(r"^# yaml-language-server: \$schema=(\S+)$", re.MULTILINE)
"""A line that tells editors where a file's schema is."""


def recipes() -> dict[str, str]:
    """Path of each recipe below `FOLDER` -> its first sentence; files that only serve others are left out."""
    found = sorted(
        path
        for pattern in ("configs/*/[!_]*.yaml", "configs/clusters/*.yaml", "slurm/*.sh")
        for path in FOLDER.glob(pattern)
        if path.name != "env.sh"
    )
    return {str(path.relative_to(FOLDER)): _first_sentence(path) for path in found}


def copy(name: str, target: Path) -> list[Path]:
    """Copy a recipe, or a folder of them, with all that it includes or names; returns the new files.

    Raises `ValueError` for an unknown name, and for a file that is there already and differs.
    """
    wanted: dict[Path, None] = {}
    waiting = list(_files(_find(name)))
    while waiting:
        if (path := waiting.pop()) not in wanted:
            wanted[path] = None
            waiting += _needs(path)
    copies = {path: target / path.relative_to(FOLDER) for path in sorted(wanted)}
    for path, made in copies.items():
        if made.exists() and made.read_bytes() != path.read_bytes():
            raise ValueError(
                f"{made}: found a file that differs from the recipe, expected none; "
                "move it, or name another directory"
            )
    for path, made in copies.items():
        made.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, made)
    return list(copies.values())


def _find(name: str) -> Path:
    for folder in (FOLDER, FOLDER / "configs", FOLDER / "slurm"):
        for suffix in ("", ".yaml", ".sh"):
            path = Path(os.path.normpath(folder / f"{name}{suffix}"))
            if path.exists() and FOLDER in path.parents:
                return path
    known = [*recipes()]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise ValueError(
        f"recipe: found {name!r}, expected a name that `megadistill recipes list` shows"
        + (f", e.g. {', '.join(near)}" if near else "")
    )


def _files(path: Path) -> Iterator[Path]:
    """A file itself, or all files below a folder."""
    return (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else iter([path])


def _needs(path: Path) -> Iterator[Path]:
    """The files that a recipe includes (relative to itself) or names (relative to the working directory)."""
    text = path.read_text(encoding="utf-8")
    names: Iterable[str] = []
    if path.suffix == ".yaml":
        texts = [*_strings(yaml.safe_load(text)), *_SCHEMA.findall(text)]
        names = filter(_PATH.fullmatch, texts)
    elif path.suffix == ".sh":
        names = _PATH.findall(re.sub(r"\$\w+/", "", text))
    for name in names:
        for folder in (path.parent, FOLDER):
            # Not resolved: links would lead out of the package.
            named = Path(os.path.normpath(folder / name))
            if FOLDER in named.parents and named not in path.parents and named.exists():
                yield from _files(named)


def _strings(tree: Any) -> Iterator[str]:
    """Every text in a YAML tree (any: it is whatever the file holds)."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _strings(child)


def _first_sentence(path: Path) -> str:
    """The beginning of the comment at the head of a file, up to its first full stop."""
    lines = _SCHEMA.sub("", path.read_text(encoding="utf-8")).lstrip("\n").splitlines()
    comment: list[str] = []
    for line in lines[1:] if lines[0].startswith("#!") else lines:
        if not line.startswith("# "):
            break
        comment.append(line.removeprefix("# "))
    return re.split(r"\.(?: |$)", " ".join(comment), maxsplit=1)[0].removesuffix(":")
