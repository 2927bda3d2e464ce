"""Conversations split by their number of turns: the longest reserved as prompts, the rest for SFT."""

import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path

from megadistill.config import PrepareConfig
from megadistill.config.prepare import ConversationsConfig
from megadistill.data.files import Row, read_rows
from megadistill.data.pools import stable_hash
from megadistill.prepare.cleaning import Cleaner
from megadistill.prepare.files import BadRowError, files_of, longest_of
from megadistill.prepare.records import Example, chat_turns
from megadistill.types import Message

PROMPTS, SFT = "prompts", "sft"


def split(
    config: PrepareConfig, recipe: ConversationsConfig, cleaner: Cleaner
) -> Iterator[Example]:
    """Prompts and supervised examples, told apart by `part`; two passes over the files."""
    files = files_of(config, recipe.source)
    reserved = _longest(config, recipe, files)
    for row in _rows(config, files):
        is_prompt = row.place in reserved
        for example in _examples(row, recipe, cleaner, is_prompt):
            if cleaner.is_clean(example):
                yield cleaner.keep(example)


def _longest(config: PrepareConfig, recipe: ConversationsConfig, files: Sequence[Path]) -> set[str]:
    """Places of the `reserve` conversations with the most turns; ties fall by a hash."""
    best: list[tuple[int, int, str]] = []
    for row in _rows(config, files):
        turns = _turns_or_none(row, recipe)
        if turns is None:
            continue
        entry = (len(turns), stable_hash(f"{config.seed}/{row.file.name}/{row.number}"), row.place)
        if len(best) < recipe.reserve:
            heapq.heappush(best, entry)
        else:
            heapq.heappushpop(best, entry)
    if len(best) < recipe.reserve:
        raise ValueError(
            f"recipe.reserve: found {len(best)} conversations of at least {recipe.min_turns} turns, "
            f"expected {recipe.reserve}"
        )
    return {place for _, _, place in best}


def _examples(
    row: Row, recipe: ConversationsConfig, cleaner: Cleaner, is_prompt: bool
) -> list[Example]:
    part = PROMPTS if is_prompt else SFT
    first = cleaner.read(row, part, lambda found: _whole(found, recipe, part))
    if first is None or first.messages is None or len(first.messages) + 1 < recipe.min_turns:
        return []
    if is_prompt or recipe.sft_turns == "last":
        return [first]
    turns = (*first.messages, {"role": "assistant", "content": first.answer or ""})
    return [
        Example(
            id=f"{first.id}-{number}",
            part=part,
            messages=turns[:number],
            answer=turn["content"],
        )
        for number, turn in enumerate(turns)
        if turn["role"] == "assistant" and turns[number - 1]["role"] == "user"
    ]


def _whole(row: Row, recipe: ConversationsConfig, part: str) -> Example:
    """All turns but the last, and the last as the answer."""
    turns = _turns(row, recipe)
    if len(turns) < 2 or turns[-2]["role"] not in ("user", "tool"):
        raise BadRowError(f"{recipe.messages!r} has no answer of the assistant to a user")
    name = f"{row.file.stem}-{row.number}"
    if recipe.id is not None:
        name = str(row.values.get(recipe.id) or name)
    return Example(
        id=f"{part}-{name}", part=part, messages=tuple(turns[:-1]), answer=turns[-1]["content"]
    )


def _turns(row: Row, recipe: ConversationsConfig) -> list[Message]:
    """The turns up to the last of the assistant."""
    turns = chat_turns(row.values, recipe.messages)
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    return turns


def _turns_or_none(row: Row, recipe: ConversationsConfig) -> list[Message] | None:
    """The turns of a conversation that can be a prompt; the second pass complains of the others."""
    try:
        turns = list(_whole(row, recipe, PROMPTS).messages or ())
    except BadRowError:
        return None
    return turns if len(turns) + 1 >= recipe.min_turns else None


def _rows(config: PrepareConfig, files: Sequence[Path]) -> Iterator[Row]:
    for file in files:
        yield from read_rows(file, longest_of(config))
