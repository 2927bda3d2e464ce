"""A row as a prompt with its answer kept apart: the only place that decides what a prompt contains.

Nothing of the answer, its letter, its explanation or its reasoning is ever read into the prompt; of
a chat everything from the answer on is dropped.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megadistill.config.prepare import RowConfig
from megadistill.data.files import Row
from megadistill.data.sources import medical_messages
from megadistill.prepare.files import BadRowError
from megadistill.types import Message

LETTERS = "ABCDEFGHIJ"
_ROLES = {"human": "user", "gpt": "assistant"}
_KNOWN = ("system", "user", "assistant", "tool")
_OPTION = re.compile(r"^\s*\(?([A-J])\s*[.):]\s*(.+?)\s*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt, as chat turns or as a question with options, and its answer."""

    id: str
    messages: tuple[Message, ...] | None = None
    question: str | None = None
    options: Mapping[str, str] | None = None
    answer: str | None = None
    part: str = ""

    @property
    def chat(self) -> tuple[Message, ...]:
        """The prompt as a model reads it; a question in the medical template."""
        if self.messages is not None:
            return self.messages
        assert self.question is not None
        return medical_messages(self.question, self.options)

    @property
    def text(self) -> str:
        """What is compared with other texts: the prompt without system message and template."""
        if self.messages is not None:
            return "\n".join(turn["content"] for turn in self.messages if turn["role"] != "system")
        return "\n".join([self.question or "", *(self.options or {}).values()])


def to_example(row: Row, config: RowConfig, part: str) -> Example:
    """Raises `BadRowError` with the reason."""
    name = f"{row.file.stem}-{row.number}"
    if config.id is not None:
        name = _text(row.values, config.id)
    values = _FORMATS[config.format](row.values, config)
    return Example(id=f"{part}-{name}", part=part, **values)


def _from_messages(row: Mapping[str, Any], config: RowConfig) -> dict[str, Any]:
    """The turns before the last answer, or before the first that calls a tool."""
    turns = chat_turns(row, config.messages)
    called = [n for n, turn in enumerate(row[config.messages]) if turn.get("tool_calls")]
    answers = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    end = called[0] if called else answers[-1] if answers else len(turns)
    if not end > 0 or turns[end - 1]["role"] not in ("user", "tool"):
        raise BadRowError(f"{config.messages!r} has no turn of the user before the answer")
    answer = turns[end]["content"] if end < len(turns) else None
    return {"messages": tuple(turns[:end]), "answer": answer or None}


def chat_turns(row: Mapping[str, Any], name: str) -> list[Message]:
    """A chat in either notation, without empty system messages."""
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise BadRowError(f"has no list of turns in {name!r}; its fields are {sorted(row)}")
    turns: list[Message] = []
    for turn in value:
        role = str(turn.get("role", turn.get("from")))
        content = turn.get("content", turn.get("value"))
        role = _ROLES.get(role, role)
        if role not in _KNOWN or not (isinstance(content, str) or turn.get("tool_calls")):
            raise BadRowError(f"{name!r} has a turn without a role or content that is known")
        turns.append({"role": role, "content": content or ""})
    if turns and turns[0]["role"] == "system" and not turns[0]["content"].strip():
        del value[0], turns[0]
    for turn in turns[:-1]:
        _check_unicode(turn["content"])
    return turns


def _from_pairs(row: Mapping[str, Any], config: RowConfig) -> dict[str, Any]:
    return {"question": _text(row, config.question), "answer": _text(row, config.answer)}


def _from_instruction(row: Mapping[str, Any], config: RowConfig) -> dict[str, Any]:
    given = row.get(config.instruction_input)
    parts = [_text(row, config.instruction), given if isinstance(given, str) else ""]
    question = "\n\n".join(part for part in parts if part.strip())
    return {"question": question, "answer": _text(row, config.output)}


def _from_choices(row: Mapping[str, Any], config: RowConfig) -> dict[str, Any]:
    question = _text(row, config.question)
    options = row.get(config.options)
    if config.options == config.question:
        question, options = _split_question(question)
    lettered = _options(options)
    if not lettered:  # an open question among the others
        return {"question": question, "answer": _text(row, config.answer)}
    answer = _letter(_text(row, config.answer), lettered)
    kept = None if config.open_ended else lettered
    return {"question": question, "options": kept, "answer": f"{answer}. {lettered[answer]}"}


def _from_medmcqa(row: Mapping[str, Any], config: RowConfig) -> dict[str, Any]:
    options = {letter: _text(row, f"op{letter.lower()}") for letter in "ABCD"}
    number = row.get("cop")
    if not isinstance(number, int) or not 0 <= number - config.letters_from < len(options):
        raise BadRowError(
            f"'cop' is {number!r}, expected {config.letters_from} to {config.letters_from + 3}"
        )
    letter = LETTERS[number - config.letters_from]
    kept = None if config.open_ended else options
    return {
        "question": _text(row, config.question),
        "options": kept,
        "answer": f"{letter}. {options[letter]}",
    }


def _split_question(text: str) -> tuple[str, dict[str, str]]:
    """A question whose last lines are its options."""
    lines = text.rstrip().splitlines()
    first = len(lines)
    while first > 0 and (_OPTION.match(lines[first - 1]) or not lines[first - 1].strip()):
        first -= 1
    return "\n".join(lines[:first]).strip(), _options("\n".join(lines[first:]))


def _options(value: Any) -> dict[str, str]:  # whatever a user's row has there
    """Options by letter; empty where there are none. Letters must run from A without a gap."""
    if isinstance(value, str):
        found = [match for line in value.splitlines() if (match := _OPTION.match(line))]
        pairs = [(match[1], match[2]) for match in found]
    elif isinstance(value, list):
        pairs = list(zip(LETTERS, map(str, value), strict=False))
        if len(value) > len(LETTERS):
            raise BadRowError(f"has {len(value)} options, expected at most {len(LETTERS)}")
    elif isinstance(value, dict):
        pairs = [(str(k).strip().upper(), str(v)) for k, v in value.items() if v is not None]
    else:
        pairs = []
    letters = "".join(letter for letter, _ in pairs)
    if letters != LETTERS[: len(letters)] or len(letters) == 1:
        raise BadRowError(f"has options with the letters {letters!r}, expected A, B, ... in order")
    return dict(pairs)


def _letter(answer: str, options: Mapping[str, str]) -> str:
    """The letter that the answer field means."""
    bare = answer.strip().strip("().").upper()
    if bare in options:
        return bare
    same = [k for k, text in options.items() if text.strip().lower() == answer.strip().lower()]
    if len(same) == 1:
        return same[0]
    begun = re.match(r"\(?([A-J])\s*[.):]", answer.strip())
    if begun and begun[1] in options:
        return begun[1]
    raise BadRowError(f"its answer {answer[:40]!r} is none of the options {', '.join(options)}")


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        raise BadRowError(f"has no field {name!r}; its fields are {sorted(map(str, row))}")
    if not isinstance(value, str | int | float) or not str(value).strip():
        raise BadRowError(f"field {name!r} holds no text: {str(value)[:40]!r}")
    return _check_unicode(str(value))


def _check_unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(f"holds half a character: {error}") from None
    return text


_FORMATS = {
    "messages": _from_messages,
    "pairs": _from_pairs,
    "instruction": _from_instruction,
    "choices": _from_choices,
    "medmcqa": _from_medmcqa,
}
