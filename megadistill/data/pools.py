"""Prompt pools: rendered, tokenized, split, and drawn in an order that is a pure function.

A draw is (pool, position): position counts every prompt ever drawn from the pool, so a resumed
run needs one integer a pool to continue exactly where it was.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from megadistill.config.schema import DataConfig
from megadistill.data.records import Record
from megadistill.data.sources import read_pool
from megadistill.data.tokenizer import UnreadableTextError, answer_end, chat_ids, text_ids
from megadistill.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPool:
    """The prompts of one pool; `train` and `heldout` share no id and no text."""

    name: str
    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    num_dropped: int
    """Records that were too long, even with one turn, or with their answer."""
    seed: int
    num_unusable: int = 0
    """Records that the tokenizer or its chat template cannot read."""

    def draw(self, position: int, count: int) -> list[Prompt]:
        """Prompts number `position` to `position + count` of an endless stream.

        Without replacement inside a pass over the pool; every pass has its own order.
        """
        size = len(self.train)
        orders = {
            index: self._order(index)
            for index in range(position // size, (position + count - 1) // size + 1)
        }
        return [
            self.train[orders[number // size][number % size]]
            for number in range(position, position + count)
        ]

    def _order(self, pass_index: int) -> Sequence[int]:
        key = [self.seed, stable_hash(self.name) % 2**32, pass_index]
        order: Sequence[int] = np.random.default_rng(key).permutation(len(self.train)).tolist()
        return order


def make_pools(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    names: Iterable[str],
    *,
    max_answered: int | None = None,
) -> dict[str, PromptPool]:
    """Read, render and split the pools `names`.

    `max_answered` bounds prompt and answer together, for algorithms that train on answers. Raises
    `ValueError` when a pool is empty or two of its records share an id.
    """
    return {name: _make_pool(name, config, tokenizer, seed, max_answered) for name in names}


def _make_pool(
    name: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    max_answered: int | None,
) -> PromptPool:
    train: list[Prompt] = []
    heldout: list[Prompt] = []
    first_with: dict[int, str] = {}  # text -> id: records of one text lie on one side of the split
    num_dropped = num_unusable = 0
    for record in read_pool(config.pools[name], name):
        try:
            prompt = _render(record, name, config, tokenizer)
            is_too_long = prompt is None or _is_too_long(prompt, tokenizer, max_answered)
        except UnreadableTextError:
            num_unusable += 1
            if num_unusable > config.unusable:
                raise
            continue
        if prompt is None or is_too_long:
            num_dropped += 1
            continue
        text = stable_hash(json.dumps(prompt.messages))
        if is_heldout(first_with.setdefault(text, record.id), config.heldout_fraction):
            heldout.append(prompt)
        else:
            train.append(prompt)
    if not train:
        raise ValueError(
            f"data.pools.{name}: no prompt is left to train on ({num_dropped} were "
            f"longer than data.max_prompt_tokens = {config.max_prompt_tokens}, or with their "
            f"answer than {max_answered}; {len(heldout)} are held out)"
        )
    return PromptPool(
        name=name,
        train=train,
        heldout=heldout,
        num_dropped=num_dropped,
        num_unusable=num_unusable,
        seed=seed,
    )


def is_heldout(record_id: str, fraction: float) -> bool:
    """Whether a record is never trained on: a hash of its id, so it stays so as a set grows."""
    return stable_hash(record_id) % 10_000 < fraction * 10_000


def stable_hash(text: str) -> int:
    """The same 63-bit number in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def answer_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The reference answer as the student would write it: its tokens and the end token.

    Raises `ValueError` when the prompt has no answer.
    """
    if prompt.answer is None:
        raise ValueError(
            f"data.pools.{prompt.pool}: record {prompt.id!r} has no answer, which sft needs; "
            "set `answer` of its source"
        )
    with _record(prompt.pool, prompt.id):
        return [*text_ids(prompt.answer, tokenizer), *answer_end(tokenizer)]


@contextmanager
def _record(pool: str, record_id: str) -> Iterator[None]:
    """Lets what makes a text unreadable name its record."""
    try:
        yield
    except UnreadableTextError as error:
        raise UnreadableTextError(f"data.pools.{pool}: record {record_id!r}: {error}") from None


def _render(
    record: Record, pool: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Prompt | None:
    """Token ids by the chat template; drops the oldest turns that do not fit, None if one is too long."""
    messages = list(record.messages)
    first = 1 if messages[0]["role"] == "system" else 0
    while True:
        with _record(pool, record.id):
            token_ids = chat_ids(messages, tokenizer, config.enable_thinking, config.date)
        if len(token_ids) <= config.max_prompt_tokens:
            return Prompt(
                id=record.id,
                pool=pool,
                messages=tuple(messages),
                token_ids=tuple(token_ids),
                answer=record.answer,
            )
        del messages[first]
        while len(messages) > first and messages[first]["role"] != "user":
            del messages[first]  # no conversation begins with an answer
        if len(messages) == first:
            return None


def _is_too_long(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_answered: int | None
) -> bool:
    """Whether prompt and answer together are; never without a bound, or without an answer."""
    if max_answered is None or prompt.answer is None:
        return False
    return len(prompt.token_ids) + len(answer_ids(prompt, tokenizer)) > max_answered
