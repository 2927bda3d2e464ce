"""The data card: what a file was made of, as JSON for programs and Markdown for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megadistill.config import PrepareConfig
from megadistill.config.prepare import ConversationsConfig, DataFilesConfig, MixtureConfig
from megadistill.prepare.cleaning import PartCount
from megadistill.prepare.files import files_of, hash_file

Card = Mapping[str, Any]  # plain JSON values


def sources_of(config: PrepareConfig) -> dict[str, DataFilesConfig]:
    """Every source of the recipe by the part that reads it."""
    recipe = config.recipe
    if isinstance(recipe, MixtureConfig):
        return {name: part.source for name, part in recipe.parts.items()}
    assert isinstance(recipe, ConversationsConfig)
    return {"conversations": recipe.source}


def make_card(
    config: PrepareConfig,
    counts: Mapping[str, PartCount],
    outputs: Mapping[str, Path],
    settings: Mapping[str, Any],
) -> Card:
    """`outputs`: file name -> the file as written so far. The same input makes the same card."""
    sources = {}
    for name, source in sources_of(config).items():
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
        for name, count in counts.items()
    }
    return {
        "name": config.name,
        "outputs": {name: hash_file(file) for name, file in outputs.items()},
        "length_unit": f"tokens of {config.tokenizer}" if config.tokenizer else "words",
        "sources": sources,
        "parts": parts,
        "settings": dict(settings),
    }


def describe(card: Card) -> str:
    """The card as Markdown."""
    lines = [f"# {card['name']}", ""]
    lines += [f"- `{name}`: SHA-256 {digest}" for name, digest in card["outputs"].items()]
    lines += ["", "## Sources", ""]
    rows = [
        [name, source["from"], source["licence"], str(len(source["files"]))]
        for name, source in card["sources"].items()
    ]
    lines += table(["part", "from", "licence", "files"], rows)
    lines += ["", f"## Records (prompt lengths in {card['length_unit']})", ""]
    header = ["part", "read", "kept", "train", "held out", "unusable", "near duplicates"]
    rows = [
        [
            name,
            *(str(part[key]) for key in ("read", "kept", "train", "heldout", "unusable")),
            str(part["near_duplicates"]),
            ", ".join(f"{k} {v}" for k, v in part["contaminated"].items()) or "0",
            " / ".join(str(value) for value in part["prompt_length"].values()),
        ]
        for name, part in card["parts"].items()
    ]
    lines += table([*header, "in a benchmark", "least / median / p90 / p99 / most"], rows)
    return "\n".join([*lines, ""])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows]]
