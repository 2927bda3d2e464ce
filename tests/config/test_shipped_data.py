"""What shipped configurations read, a user can have: a package, the hub, or what another of them makes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadistill.config import PrepareConfig, load

CONFIGS = Path(__file__).parents[2] / "configs"
MADE = {
    f"./data/{name}.jsonl"
    for path in (CONFIGS / "prepare").glob("*.yaml")
    for config in [load(PrepareConfig, path)]
    for name in (config.name, config.sft_name)
}
ALL = sorted(CONFIGS.rglob("*.yaml"))


def texts(tree: Any, key: str = "") -> Iterator[str]:
    """Every text of a configuration but its includes; the value of a `key=value`."""
    if isinstance(tree, str) and key != "include":
        yield tree.partition("=")[2] or tree
    elif isinstance(tree, dict):
        for name, child in tree.items():
            yield from texts(child, name)
    elif isinstance(tree, list):
        for child in tree:
            yield from texts(child, key)


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_file_that_is_read_is_made_by_a_shipped_configuration(path: Path) -> None:
    for text in texts(yaml.safe_load(path.read_text(encoding="utf-8"))):
        assert not text.startswith("../"), f"{text} lies outside of the working directory"
        if text.startswith("./data/") and text.endswith(".jsonl") and "/eval/" not in text:
            assert text in MADE
