"""A shard's share of a benchmark, and how it is worked off."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megadistill.evaluate.protocol import Draw, Item
from megadistill.rollout.seeds import seed_for

COLUMNS = {
    "item": "string",
    "sample": "int64",
    "messages": "string",
    "written": "string",
    "num_tokens": "int64",
    "finish_reason": "string",
}
"""`finish_reason` is stop, length, or why there is no answer."""


@dataclass(frozen=True, slots=True)
class Questions:
    """The share of a shard: position -> item and number of the sample."""

    items: Sequence[Item]
    draw: Draw
    seed: int

    def __len__(self) -> int:
        return len(self.items) * self.draw.samples

    def at(self, position: int) -> tuple[Item, int]:
        return self.items[position // self.draw.samples], position % self.draw.samples

    def seed_at(self, position: int) -> int:
        item, sample = self.at(position)
        return seed_for(self.seed, sample, item.id)

    def row(self, position: int, **written: Any) -> dict[str, Any]:
        item, sample = self.at(position)
        messages = json.dumps(item.messages, ensure_ascii=False)
        return {"item": item.id, "sample": sample, "messages": messages, **written}


async def gather_bounded(calls: Sequence[Callable[[], Any]], most: int = 1024) -> None:
    """Run coroutines, `most` of them alive at a time; the first problem ends all."""
    waiting = iter(calls)

    async def work() -> None:
        for call in waiting:
            await call()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(most, len(calls))):
            group.create_task(work())
