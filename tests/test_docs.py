"""The documentation says what the program does: messages exist, files are valid, the site builds."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.cli.check import problem_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def strings_of_the_program() -> str:
    """Every piece of text in the package and its scripts, one after another."""
    pieces = [
        node.value
        for file in (ROOT / "megadistill").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    scripts = [*ROOT.glob("slurm/*.sh"), *ROOT.glob("tools/*.sh")]
    return "\n".join([*pieces, *(file.read_text(encoding="utf-8") for file in scripts)])


def test_every_message_of_the_troubleshooting_page_is_said_somewhere() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    said = strings_of_the_program()
    assert len(messages) > 20
    assert [message for message in messages if message not in said] == []


def test_the_files_of_the_walk_through_are_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (DOCS / "own-domain.md").read_text(encoding="utf-8")
    files = re.findall(r'^```yaml title="(.+?)"\n(.+?)^```$', text, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == [
        *("specialist.yaml", "measure.yaml", "recover.yaml", "campaign.yaml")
    ]
    for name, content in files:
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    assert [problem_of(name, with_models=False) for name, _ in files] == [None] * 4


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "reference/run/index.html").read_text(encoding="utf-8")
    assert "micro_batch_tokens" in page
    assert "Most tokens packed into one micro-batch" in page


def test_the_walks_name_files_that_exist_and_are_short() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    _, *walks = re.split(r"^## ", text, flags=re.MULTILINE)
    assert len(walks) == 4
    assert all(len(walk.splitlines()) < 25 for walk in walks)
    names = re.findall(r"`([a-z_/]+(?:\.py|/))`", text)
    assert len(names) > 30
    assert [name for name in names if not (ROOT / "megadistill" / name).exists()] == []
