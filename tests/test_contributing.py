"""The walk-throughs of CONTRIBUTING.md and docs/methods.md, carried out in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WALKS: dict[str, str] = {
    section.partition(":")[0]: section
    for page in ("CONTRIBUTING.md", "docs/methods.md")
    for section in (ROOT / page).read_text(encoding="utf-8").split("\n## ")
    if section.startswith("Add ") and "```" in section
}
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
NUM_FILES = {
    "Add an algorithm": 3,
    "Add a model family": 1,
    "Add a benchmark that a rule scores": 2,
    "Add a source of data": 2,
    "Add a site": 1,
}
"""Besides tests."""


def change(file: Path, diff: str) -> None:
    """Put the lines with `+` where those with `-` or none stand, which must be there once."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file} has {text.count(old)} times:\n{old}"
    file.write_text(text.replace(old, new), encoding="utf-8")


def run(script: str, root: Path) -> None:
    """Shell lines in the copy, whose `megadistill` is the copy's."""
    command = root / "bin" / "megadistill"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/bash\nexec {sys.executable} -m megadistill "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(root)}
    words = ["bash", "-e", "-o", "pipefail", "-c", script]
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_walk_through_is_counted() -> None:
    assert WALKS.keys() == NUM_FILES.keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NUM_FILES)
def test_a_walk_through_works(name: str, tmp_path: Path) -> None:
    for folder in ("megadistill", "configs", "slurm", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "e2e")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    touched = set()
    for language, title, text in BLOCK.findall(WALKS[name]):
        if language == "bash":
            run(text, tmp_path)
            continue
        touched |= set() if title.startswith("tests/") else {title}
        if language == "diff":
            change(tmp_path / title, text)
        else:
            assert not (tmp_path / title).exists()
            (tmp_path / title).write_text(text, encoding="utf-8")
    run("ruff check -q . && ruff format -q --check .", tmp_path)
    assert len(touched) == NUM_FILES[name]
    assert WALKS[name].rstrip().count("```bash") == 1
