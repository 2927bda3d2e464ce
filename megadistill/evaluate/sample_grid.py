"""A shard's share of a benchmark: a grid of items and samples, worked off by position."""

from collections.abc import Sequence
from dataclasses import dataclass

from megadistill.evaluate.protocol import Item
from megadistill.inference.requests import SamplingParams
from megadistill.refine.blocks import KEY, Row, RowNamer
from megadistill.rollout.seeds import seed_for

COLUMNS = {
    "item": "string",
    "sample": "int64",
    "written": "string",
    "num_tokens": "int64",
    "finish_reason": "string",
}
"""`finish_reason` is stop, length, or why there is no answer."""


@dataclass(frozen=True, slots=True)
class SampleGrid:
    """The share of a shard: position -> item and number of the sample."""

    items: Sequence[Item]
    sampling: SamplingParams
    seed: int

    def __len__(self) -> int:
        return len(self.items) * self.sampling.samples

    def at(self, position: int) -> tuple[Item, int]:
        return self.items[position // self.sampling.samples], position % self.sampling.samples

    def seed_at(self, position: int) -> int:
        item, sample = self.at(position)
        return seed_for(self.seed, sample, item.id)

    def labels(self, key_of: RowNamer) -> list[Row]:
        """Of every row, see `Blocks`."""
        found = map(self.at, range(len(self)))
        return [
            {"item": item.id, "sample": sample, KEY: key_of(item.id, item.messages, sample)}
            for item, sample in found
        ]


def answer_row(written: str, finish_reason: str, num_tokens: int | None = None) -> Row:
    """An answer, but for what its label says."""
    return {"written": written, "num_tokens": num_tokens, "finish_reason": finish_reason}
