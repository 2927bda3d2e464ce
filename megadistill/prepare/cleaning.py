"""What keeps a record out of the result, and the count of it."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from megadistill.config import PrepareConfig
from megadistill.data.files import Row
from megadistill.data.pools import is_heldout
from megadistill.prepare.files import BadRowError
from megadistill.prepare.overlap import BenchmarkItems, NearDuplicates
from megadistill.prepare.records import Example
from megadistill.types import Message

Measure = Callable[[tuple[Message, ...]], int]
"""Length of a prompt."""


@dataclass(slots=True)
class PartCount:
    """What became of the rows of one part, and how long its prompts are."""

    read: int = 0
    kept: int = 0
    heldout: int = 0
    unusable: int = 0
    duplicates: int = 0
    contaminated: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)

    def quantiles(self) -> dict[str, int]:
        if not self.lengths:
            return {}
        points = {"least": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "most": 1.0}
        return {
            name: int(np.quantile(self.lengths, share, method="inverted_cdf"))
            for name, share in points.items()
        }


class Cleaner:
    """Takes records one by one and says which stay."""

    def __init__(
        self, config: PrepareConfig, benchmarks: BenchmarkItems | None, measure: Measure
    ) -> None:
        self.counts: dict[str, PartCount] = {}
        self._config = config
        self._benchmarks = benchmarks
        self._measure = measure
        self._ids: dict[str, str] = {}
        chosen = config.duplicates
        self._duplicates = NearDuplicates(chosen.n, chosen.threshold) if chosen else None
        self._unusable = 0

    def read(self, row: Row, part: str, convert: Callable[[Row], Example]) -> Example | None:
        """The row as a record; None when it is unusable and may be. Raises `ValueError`."""
        count = self.counts.setdefault(part, PartCount())
        count.read += 1
        try:
            example = convert(row)
        except BadRowError as error:
            count.unusable += 1
            self._unusable += 1
            if self._unusable > self._config.unusable:
                raise ValueError(f"{row.place}: {error}") from None
            return None
        if (first := self._ids.setdefault(example.id, row.place)) != row.place:
            raise ValueError(
                f"{row.place}: its id {example.id!r} is also that of {first}; without `row.id` rows "
                "are named by their number"
            )
        return example

    def is_clean(self, example: Example) -> bool:
        """Whether no earlier record is like it, and no benchmark has it."""
        count = self.counts.setdefault(example.part, PartCount())
        text = example.text
        if self._benchmarks is not None and (name := self._benchmarks.found_in(text)):
            count.contaminated[name] += 1
            return False
        if self._duplicates is not None and not self._duplicates.is_new(text):
            count.duplicates += 1
            return False
        return True

    def keep(self, example: Example) -> Example:
        """Count a record that goes into the result."""
        count = self.counts.setdefault(example.part, PartCount())
        count.kept += 1
        count.heldout += is_heldout(example.id, self._config.heldout_fraction)
        count.lengths.append(self._measure(example.chat))
        return example

    def clean(self, examples: Iterable[Example]) -> Iterable[Example]:
        """Those that stay, counted."""
        return (self.keep(example) for example in examples if self.is_clean(example))
