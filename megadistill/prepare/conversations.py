"""Conversations split by their number of turns: the longest reserved as prompts, the rest for SFT."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from megadistill.config import PrepareConfig
from megadistill.config.prepare import ConversationsConfig
from megadistill.config.rows import RowConfig
from megadistill.data.files import BadRowError, Row, read_all
from megadistill.data.pools import stable_hash
from megadistill.data.records import Record
from megadistill.prepare.cleaning import Cleaner, read_record
from megadistill.prepare.files import files_of, longest_of

PROMPTS, SFT = "prompts", "sft"


def split(config: PrepareConfig, recipe: ConversationsConfig, cleaner: Cleaner) -> Iterator[Record]:
    """Prompts and supervised examples, told apart by `part`; two passes over the files."""
    fields = RowConfig(format="messages", id=recipe.id, messages=recipe.messages)
    files, longest = files_of(recipe.source), longest_of(config)
    reserved = _longest(read_all(files, longest), recipe, fields, config.seed)
    for row in read_all(files, longest):
        part = PROMPTS if row.place in reserved else SFT
        record = cleaner.read(row, fields, part, answered=True)
        if record is None or len(record.messages) + 1 < recipe.min_turns:
            continue
        every_turn = part == SFT and recipe.sft_turns == "all"
        yield from filter(cleaner.keeps, _turn_by_turn(record) if every_turn else [record])


def _longest(
    rows: Iterable[Row], recipe: ConversationsConfig, fields: RowConfig, seed: int
) -> set[str]:
    """Places of the `reserve` conversations with the most turns; ties fall by a hash."""
    entries = (
        (
            _num_turns(row, fields),
            stable_hash(f"{seed}/{Path(row.source).name}/{row.number}"),
            row.place,
        )
        for row in rows
    )
    best = heapq.nlargest(recipe.reserve, (e for e in entries if e[0] >= recipe.min_turns))
    if len(best) < recipe.reserve:
        raise ValueError(
            f"recipe.reserve: found {len(best)} conversations of at least {recipe.min_turns} turns, "
            f"expected {recipe.reserve}"
        )
    return {place for _, _, place in best}


def _turn_by_turn(record: Record) -> Iterator[Record]:
    """An example for each answer of the assistant to a user."""
    turns = (*record.messages, {"role": "assistant", "content": record.raw_answer})
    for at, turn in enumerate(turns):
        if turn["role"] == "assistant" and turns[at - 1]["role"] == "user":
            yield replace(record, id=f"{record.id}-{at}", prompt=turns[:at], answer=turn["content"])


def _num_turns(row: Row, fields: RowConfig) -> int:
    """Of a conversation that can be a prompt; the second pass complains of the others, which have 0."""
    try:
        return len(read_record(row, fields, PROMPTS, answered=True).messages) + 1
    except BadRowError:
        return 0
