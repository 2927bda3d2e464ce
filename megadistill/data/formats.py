"""A row of data as a record: the only place that decides what a prompt contains.

Nothing of the answer, its letter, its explanation or its reasoning is ever read into the prompt; of
a chat everything from the answer on is dropped. A cell of a table may hold its list as JSON, or as
Python writes it. Values are whatever JSON users' files hold, hence `Any`.
"""

import ast
import json
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from megadistill.config.rows import Message, RowConfig
from megadistill.config.schema import RowsSource
from megadistill.data.files import BadRowError, Row
from megadistill.data.records import Record

LETTERS = "ABCDEFGHIJ"
SHAREGPT = "conversations"
_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}
_UNREADABLE = (ValueError, SyntaxError, RecursionError, MemoryError)
_OPTION = re.compile(r"^\s*\(?([A-J])\s*[.):]\s*(.+?)\s*$")
Values = Mapping[str, Any]
Turns = tuple[Message, ...]
Parts = tuple[str | Turns, Mapping[str, str] | None, str | None]
"""Prompt, options, answer."""


def to_record(
    row: Row, fields: RowConfig | RowsSource, *, part: str = "", answered: bool = False
) -> Record:
    """A row as `fields` say, with an answer if it must be `answered`.

    Raises `BadRowError` with its place.
    """
    values = row.values
    try:
        if isinstance(fields, RowsSource):
            prompt, options, answer = _from_prompt(values, fields)
            name = _name(row, "id")
        else:
            prompt, options, answer = FORMATS[fields.format](values, fields)
            name = _name(row, fields.id)
        if answered and answer is None:
            raise BadRowError("no_answer", "has no answer of the assistant")
    except BadRowError as error:
        raise error.at(row.place) from None
    record_id = f"{part}-{name}" if part else name
    return Record(id=record_id, prompt=prompt, options=options or None, answer=answer, part=part)


def _name(row: Row, field: str | None) -> str:
    """What the field says, where there is one; otherwise the file's name and the row's number."""
    value = row.values.get(field) if field is not None else None
    is_name = not isinstance(value, dict | list) and not _is_absent(value) and str(value).strip()
    return str(value) if is_name else row.name


def read_chat(value: Any, name: str) -> tuple[list[Message], int]:
    """The turns of a chat, and how many there are before the first that calls a tool.

    A turn has `role` and `content`, or `from` and `value`. Raises `BadRowError`.
    """
    value = parsed(value)
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise BadRowError("bad_messages", f"has no list of turns in {name!r}")
    turns: list[Message] = []
    calls: list[bool] = []
    for turn in value:
        # Parquet gives every turn the fields of all turns.
        role = str(turn.get("role") or turn.get("from"))
        if role not in _ROLES:
            known = ", ".join(_ROLES)
            why = f"has a turn of {role!r} in {name!r}, expected one of {known}"
            raise BadRowError("bad_messages", why)
        called = turn.get("tool_calls") or turn.get("function_call") or role == "function_call"
        calls.append(bool(called))
        content = turn.get("value") if turn.get("content") is None else turn["content"]
        text = "" if content is None and called else _content(content, name)
        turns.append({"role": _ROLES[role], "content": text})
    return turns, [*calls, True].index(True)


def split_chat(value: Any, name: str, *, is_open: bool = False) -> tuple[Turns, str | None]:
    """What comes before the last answer, or before the first call of a tool, and the answer.

    An open chat is answered only by its last turn. Raises `BadRowError`.
    """
    turns, end = read_chat(value, name)
    answers = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not turns:
        raise BadRowError("no_answer", f"has no turns in {name!r}")
    answer = None
    if end == len(turns) and answers and (not is_open or answers[-1] == end - 1):
        end = answers[-1]
        answer = turns[end]["content"]
    asked = turns[:end]
    if not any(turn["role"] == "user" for turn in asked) or end - 1 in answers:
        raise BadRowError("no_question", f"has no turn of the user to answer in {name!r}")
    return tuple(asked), answer


def parsed(value: Any) -> Any:
    """What a cell's text holds, where that is a list or a mapping."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for read in (json.loads, ast.literal_eval):
            with warnings.catch_warnings(action="ignore"), suppress(*_UNREADABLE):
                return read(value.strip())
    return value


def _content(value: Any, name: str) -> str:
    """A turn's text, also as the parts of OpenAI's interface."""
    parts = value if isinstance(value, list) else [value]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not texts or not all(isinstance(t, str | int | float) and not _is_absent(t) for t in texts):
        raise BadRowError("not_text", f"has a turn in {name!r} whose `content` is no text")
    return "\n".join(map(str, texts))


def read_options(value: Any) -> dict[str, str]:
    """Options by letter, whichever way they are written; empty where there are none."""
    value = parsed(value)
    if isinstance(value, str):
        found = [match for line in value.splitlines() if (match := _OPTION.match(line))]
        pairs: list[tuple[Any, Any]] = [(match[1], match[2]) for match in found]
    elif isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and all(_has(option, "key", "value") for option in value):
        pairs = [(option["key"], option["value"]) for option in value]
    elif isinstance(value, list) and len(value) <= len(LETTERS):
        pairs = list(zip(LETTERS, value, strict=False))
    elif _is_absent(value):
        pairs = []
    else:
        why = f"has the options {str(value)[:60]}, expected up to {len(LETTERS)} letters and texts"
        raise BadRowError("bad_options", why)
    # Parquet gives every row the letters of all rows.
    return {
        str(key).strip(): _text(text, f"option {key}")
        for key, text in pairs
        if not _is_absent(text)
    }


def lettered(options: Mapping[str, str]) -> dict[str, str]:
    """Options whose letters run from A without a gap. Raises `BadRowError` for others."""
    letters = "".join(options).upper()
    if letters != LETTERS[: len(options)] or len(options) == 1:
        why = f"has options with the letters {letters!r}, expected A, B, ... in order"
        raise BadRowError("bad_options", why)
    return dict(zip(letters, options.values(), strict=True))


def _from_prompt(values: Values, source: RowsSource) -> Parts:
    """A field with the user's text, or with a chat, and others with the answer and the options."""
    for name in (source.prompt, source.answer, source.options):
        if name is not None and name not in values:
            raise _missing(values, name)
    value = values[source.prompt]
    prompt: str | Turns = value
    answer = None
    if isinstance(value, list) or _is_chat(parsed(value)):
        prompt, answer = split_chat(value, source.prompt, is_open=True)
    elif not isinstance(value, str) or not value.strip():
        why = f"has {source.prompt!r} empty, or neither text nor chat messages"
        raise BadRowError("empty_question", why)
    if source.answer is not None:
        value = values[source.answer]
        answer = None if _is_absent(value) else _text(value, source.answer)
    options = read_options(values[source.options]) if source.options else None
    # An empty cell of a CSV file is no answer.
    return prompt, options, answer if answer and answer.strip() else None


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(_has(turn, "role") or _has(turn, "from") for turn in value)
    )


def _has(value: Any, *names: str) -> bool:
    return isinstance(value, dict) and set(names) <= value.keys()


def _from_auto(values: Values, fields: RowConfig) -> Parts:
    """Whichever of the formats its fields allow."""

    def has(*names: str) -> bool:
        return not any(_is_absent(values.get(name)) for name in names)

    for name in (fields.messages, SHAREGPT):
        if has(name) and values[name] != "":
            return _from_messages(values, fields.model_copy(update={"messages": name}))
    if has(fields.question, fields.answer):
        return _from_pairs(values, fields)
    if has(fields.instruction, fields.output):
        return _from_instruction(values, fields)
    raise _missing(values, fields.question)


def _from_messages(values: Values, fields: RowConfig) -> Parts:
    if _is_absent(values.get(fields.messages)):
        raise _missing(values, fields.messages)
    prompt, answer = split_chat(values[fields.messages], fields.messages)
    return prompt, None, answer


def _from_pairs(values: Values, fields: RowConfig) -> Parts:
    question = text_of(values, fields.question, "empty_question")
    return question, None, text_of(values, fields.answer, "empty_answer")


def _from_instruction(values: Values, fields: RowConfig) -> Parts:
    given = values.get(fields.instruction_input)
    parts = [
        "" if _is_absent(part) else _text(part, fields.instruction)
        for part in (values.get(fields.instruction), given)
    ]
    question = "\n\n".join(part for part in parts if part.strip())
    if not question:
        raise BadRowError("empty_question", f"has nothing in {fields.instruction!r}")
    return question, None, text_of(values, fields.output, "empty_answer")


def _from_choices(values: Values, fields: RowConfig) -> Parts:
    question = text_of(values, fields.question, "empty_question")
    answer = text_of(values, fields.answer, "empty_answer")
    written = values.get(fields.options)
    if fields.options == fields.question:
        question, written = _split_question(question)
    options = lettered(read_options(written))
    if not options:  # an open question among the others
        return question, None, answer
    return _choice(question, options, _letter(answer, options), fields)


def _from_medmcqa(values: Values, fields: RowConfig) -> Parts:
    options = {letter: text_of(values, f"op{letter.lower()}", "bad_options") for letter in "ABCD"}
    letters = {str(at): letter for at, letter in enumerate(options, start=fields.letters_from)}
    number = str(values.get("cop"))
    if number not in letters:
        raise BadRowError("bad_answer", f"has {number!r} in 'cop', expected {', '.join(letters)}")
    question = text_of(values, fields.question, "empty_question")
    return _choice(question, options, letters[number], fields)


def _choice(question: str, options: dict[str, str], letter: str, fields: RowConfig) -> Parts:
    return question, None if fields.open_ended else options, f"{letter}. {options[letter]}"


def _split_question(text: str) -> tuple[str, str]:
    """A question whose last lines are its options, without these, and these."""
    lines = text.rstrip().splitlines()
    first = len(lines)
    while first > 0 and (_OPTION.match(lines[first - 1]) or not lines[first - 1].strip()):
        first -= 1
    return "\n".join(lines[:first]).strip(), "\n".join(lines[first:])


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
    why = f"has the answer {answer[:40]!r}, which is none of the options {', '.join(options)}"
    raise BadRowError("bad_answer", why)


def text_of(values: Values, name: str, empty: str) -> str:
    """A field's text. Raises `BadRowError`, `empty` its reason where there is only white space."""
    if _is_absent(values.get(name)):
        raise _missing(values, name)
    text = _text(values[name], name)
    if not text.strip():
        raise BadRowError(empty, f"has no text in {name!r}")
    return text


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str | int | float):
        kind = type(value).__name__
        raise BadRowError("not_text", f"has a {kind} in {name!r}, expected text")
    return str(value)


def _is_absent(value: Any) -> bool:
    """Whether it is null, or the NaN by which pandas says so."""
    return value is None or value != value


def _missing(values: Values, name: str) -> BadRowError:
    return BadRowError(
        "missing_fields", f"has no field {name!r}; it has {sorted(map(str, values))}"
    )


FORMATS: Mapping[str, Callable[[Values, RowConfig], Parts]] = {
    "auto": _from_auto,
    "messages": _from_messages,
    "pairs": _from_pairs,
    "instruction": _from_instruction,
    "choices": _from_choices,
    "medmcqa": _from_medmcqa,
}
