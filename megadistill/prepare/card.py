"""The data card: what a file was made of, as JSON for programs and Markdown for people."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from megadistill.config import PrepareConfig
from megadistill.prepare.cleaning import Cleaner
from megadistill.prepare.files import files_of

Card = Mapping[str, Any]  # plain JSON values
TEMPLATE = Path(__file__).with_name("templates") / "card.md"


def make_card(
    config: PrepareConfig,
    cleaner: Cleaner,
    outputs: Mapping[str, Path],
    settings: Mapping[str, Any],
) -> Card:
    """`outputs`: file name -> the file as written so far. The same input makes the same card."""
    sources = {}
    for name, source in config.recipe.sources.items():
        sources[name] = {
            "from": f"{source.hub}@{source.revision}" if source.hub else "files",
            "licence": source.licence,
            "files": {file.name: hash_file(file) for file in files_of(source)},
        }
    parts = {
        name: {
            "read": count.read,
            "kept": count.kept,
            "train": count.kept - count.heldout,
            "heldout": count.heldout,
            "unusable": count.unusable.total(),
            "unusable_by_reason": dict(sorted(count.unusable.items())),
            "near_duplicates": count.duplicates,
            "contaminated": dict(sorted(count.contaminated.items())),
            "prompt_length": count.quantiles(),
        }
        for name, count in cleaner.counts.items()
    }
    return {
        "name": config.name,
        "outputs": {name: hash_file(file) for name, file in outputs.items()},
        "length_unit": f"tokens of {config.tokenizer}" if config.tokenizer else "words",
        "sources": sources,
        "parts": parts,
        "benchmarks": cleaner.benchmarks.counts if cleaner.benchmarks else {},
        "settings": dict(settings),
    }


def describe(card: Card) -> str:
    """The card as Markdown."""
    template = jinja2.Template(
        TEMPLATE.read_text(encoding="utf-8"),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return str(template.render(card))


def hash_file(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
