"""Prompt templates: text files of chat turns with {placeholders}, which a user can replace.

    === user ===
    {question}
    === assistant ===
    How the answer begins (optional, last; only for the rewriting model).

Values are put in as they are in one pass, so braces in them mean nothing.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megadistill.config.rows import Message
from megadistill.resolve import resolve

_TURN = re.compile(r"^=== (system|user|assistant) ===\n", re.MULTILINE)
_NAME = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A parsed template file."""

    name: str
    turns: tuple[Message, ...]
    hash: str
    """Sixteen hexadecimal digits of the file's content."""

    @property
    def has_opening(self) -> bool:
        """Whether the last turn is how the assistant's answer begins."""
        return self.turns[-1]["role"] == "assistant"

    def fill(self, values: Mapping[str, str]) -> list[Message]:
        """The chat turns with every {name} of `values` replaced; other braces stay."""

        def value(match: re.Match[str]) -> str:
            return values.get(match[1], match[0])

        return [
            {"role": turn["role"], "content": _NAME.sub(value, turn["content"])}
            for turn in self.turns
        ]


def load_template(path: str, names: tuple[str, ...]) -> Template:
    """Read a template that must use every one of `names`.

    Raises `ValueError` saying which file is wrong and how.
    """
    file = resolve("template", path)
    text = file.read_text(encoding="utf-8")
    _, *parts = _TURN.split(text)
    turns = tuple(
        {"role": role, "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    )
    if not any(turn["role"] == "user" for turn in turns):
        raise ValueError(f"{file}: found no line `=== user ===`, expected one before the text")
    found = {name for turn in turns for name in _NAME.findall(turn["content"])}
    if absent := sorted(set(names) - found):
        raise ValueError(f"{file}: found no {{{absent[0]}}}, expected {', '.join(names)}")
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Template(name=file.stem, turns=turns, hash=digest)
