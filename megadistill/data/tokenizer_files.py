"""The files of a model's tokenizer: what can be said of them without the library that reads them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jinja2

from megadistill.resolve import read_settings

TOKENIZER = "tokenizer.json"
OLDER = ("tokenizer.model", "vocab.json", "vocab.txt")
"""What the library makes one from."""


def check_ids(directory: Path, vocabulary: Mapping[str, int]) -> None:
    """Raise `ValueError` when a token has an id beyond the rows of the model's embedding."""
    size = read_settings(directory / "config.json").get("vocab_size")
    if size is None:
        return
    if beyond := sorted(token for token, number in vocabulary.items() if number >= size):
        raise ValueError(
            f"{directory}: its tokenizer has {len(beyond)} ids beyond the {size} rows of the "
            f"embedding (vocab_size), e.g. of {beyond[0]!r}; resize the embedding or remove the tokens"
        )


def check_same(
    vocabulary: Mapping[str, int], expected: Mapping[str, int], unused: Collection[str] = ()
) -> None:
    """Raise `ValueError` unless a teacher knows every token of the student's by the same id.

    It may lack those that are `unused`, and have more.
    """
    absent = {token for token in unused if token not in vocabulary}
    if differing := sorted(
        token
        for token, number in expected.items()
        if token not in absent and vocabulary.get(token) != number
    ):
        examples = ", ".join(
            f"{token!r} ({expected[token]}, {vocabulary.get(token, 'unknown')})"
            for token in differing[:5]
        )
        raise ValueError(
            f"{len(differing)} tokens have another id than in the student's tokenizer "
            f"(0 allowed), e.g. {examples}"
        )


def unused_tokens(directory: Path) -> set[str]:
    """Tokens that were added to a vocabulary and are neither the end token nor in the chat template."""
    added = {
        token["content"] for token in read_settings(directory / TOKENIZER).get("added_tokens", ())
    }
    end = read_settings(directory / "tokenizer_config.json").get("eos_token")
    named = [end["content"] if isinstance(end, dict) else str(end), *_templates(directory)]
    return {token for token in added if not any(token in text for text in named)}


def read_vocabulary(directory: Path) -> dict[str, int]:
    """Token -> id; empty for tokenizers of older kinds, of which nothing is known.

    Raises `ValueError` when there is no tokenizer, its file is not whole, or the model has fewer ids.
    """
    file = directory / TOKENIZER
    if not file.exists():
        if any((directory / name).exists() for name in OLDER):
            return {}
        raise ValueError(f"{directory}: found no {TOKENIZER}, expected the files of a tokenizer")
    found = read_settings(file)
    pieces = found.get("model", {}).get("vocab", {})
    if isinstance(pieces, list):  # of pairs, each with its weight
        pieces = {piece: number for number, (piece, _) in enumerate(pieces)}
    added = {token["content"]: token["id"] for token in found.get("added_tokens", ())}
    vocabulary = {**pieces, **added}
    if not vocabulary:
        raise ValueError(
            f"{file}: found no vocabulary, expected tokens with ids; download it again"
        )
    check_ids(directory, vocabulary)
    return vocabulary


def check_chat_template(directory: Path) -> None:
    """Raise `ValueError` when there is none, or one that is no template."""
    templates = _templates(directory)
    if not any(template.strip() for template in templates):
        raise ValueError(f"{directory} has no chat template")
    # transformers has a tag of its own, `generation`.
    for template in templates:
        try:
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        except jinja2.TemplateSyntaxError as error:
            if "generation" not in str(error):
                raise ValueError(f"{directory}: its chat template is none: {error}") from None


def _templates(directory: Path) -> list[str]:
    """The chat template, or all of those that older files hold by name."""
    file = directory / "chat_template.jinja"
    if file.exists():
        return [file.read_text(encoding="utf-8")]
    files = [
        read_settings(directory / name) for name in ("chat_template.json", "tokenizer_config.json")
    ]
    found: Any = next((some["chat_template"] for some in files if some.get("chat_template")), [])
    return [found] if isinstance(found, str) else [some["template"] for some in found]
