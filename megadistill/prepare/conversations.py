"""Conversations split by their number of turns: the longest reserved as prompts, the rest for SFT."""

import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path

from megadistill.config import PrepareConfig
from megadistill.config.prepare import ConversationsConfig
from megadistill.config.rows import RowConfig
from megadistill.data.files import BadRowError, Row, read_rows
from megadistill.data.formats import to_record
from megadistill.data.pools import stable_hash
from megadistill.data.records import Record
from megadistill.prepare.cleaning import Cleaner, without_empty_system
from megadistill.prepare.files import files_of, longest_of

PROMPTS, SFT = "prompts", "sft"


def split(config: PrepareConfig, recipe: ConversationsConfig, cleaner: Cleaner) -> Iterator[Record]:
    """Prompts and supervised examples, told apart by `part`; two passes over the files."""
    files = files_of(recipe.source)
    reserved = _longest(config, recipe, files)
    for row in _rows(config, files):
        is_prompt = row.place in reserved
        for record in _records(row, recipe, cleaner, is_prompt):
            if cleaner.is_clean(record):
                yield cleaner.keep(record)


def _longest(config: PrepareConfig, recipe: ConversationsConfig, files: Sequence[Path]) -> set[str]:
    """Places of the `reserve` conversations with the most turns; ties fall by a hash."""
    best: list[tuple[int, int, str]] = []
    for row in _rows(config, files):
        num_turns = _num_turns(row, recipe)
        if num_turns < recipe.min_turns:
            continue
        name = f"{Path(row.source).name}/{row.number}"
        entry = (num_turns, stable_hash(f"{config.seed}/{name}"), row.place)
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


def _records(
    row: Row, recipe: ConversationsConfig, cleaner: Cleaner, is_prompt: bool
) -> list[Record]:
    part = PROMPTS if is_prompt else SFT
    first = cleaner.read(row, part, lambda found: _whole(found, recipe, part))
    if first is None or len(first.messages) + 1 < recipe.min_turns:
        return []
    if is_prompt or recipe.sft_turns == "last":
        return [first]
    turns = (*first.messages, {"role": "assistant", "content": first.answer or ""})
    return [
        Record(id=f"{first.id}-{at}", part=part, prompt=turns[:at], answer=turn["content"])
        for at, turn in enumerate(turns)
        if turn["role"] == "assistant" and turns[at - 1]["role"] == "user"
    ]


def _whole(row: Row, recipe: ConversationsConfig, part: str) -> Record:
    """All turns but the last answer, and that as the answer."""
    fields = RowConfig(format="messages", id=recipe.id, messages=recipe.messages)
    record = to_record(row, fields, part=part)
    if record.answer is None:
        why = f"has no answer of the assistant to a user in {recipe.messages!r}"
        raise BadRowError("no_answer", why, row.place)
    return without_empty_system(record)


def _num_turns(row: Row, recipe: ConversationsConfig) -> int:
    """Of a conversation that can be a prompt; the second pass complains of the others, which have 0."""
    try:
        return len(_whole(row, recipe, PROMPTS).messages) + 1
    except BadRowError:
        return 0


def _rows(config: PrepareConfig, files: Sequence[Path]) -> Iterator[Row]:
    for file in files:
        yield from read_rows(file, longest_of(config))
