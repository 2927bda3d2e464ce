"""Drops and counts records that do not belong in the result."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from megadistill.config import PrepareConfig
from megadistill.config.rows import Message, RowConfig
from megadistill.data.files import BadRowError, Row
from megadistill.data.formats import to_record
from megadistill.data.pools import is_heldout
from megadistill.data.records import Record
from megadistill.prepare.overlap import BenchmarkItems, NearDuplicates

Measure = Callable[[tuple[Message, ...]], int]
"""Length of a prompt."""


@dataclass(slots=True)
class PartCount:
    """What became of the rows of one part, and how long its prompts are."""

    read: int = 0
    kept: int = 0
    heldout: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    """By reason."""
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
        self.counts: defaultdict[str, PartCount] = defaultdict(PartCount)
        self._config = config
        self.benchmarks = benchmarks
        self._measure = measure
        self._ids: dict[str, str] = {}
        chosen = config.duplicates
        self._duplicates = NearDuplicates(chosen.n, chosen.threshold) if chosen else None

    def read(
        self, row: Row, fields: RowConfig, part: str, *, answered: bool = False
    ) -> Record | None:
        """The row as a record; None when it is unusable and may be. Raises `ValueError`."""
        count = self.counts[part]
        count.read += 1
        try:
            record = read_record(row, fields, part, answered=answered)
        except BadRowError as error:
            count.unusable[error.reason] += 1
            if sum(c.unusable.total() for c in self.counts.values()) > self._config.unusable:
                raise
            return None
        if (first := self._ids.setdefault(record.id, row.place)) != row.place:
            raise ValueError(
                f"{row.place}: its id {record.id!r} is also that of {first}; without `row.id` rows "
                "are named by their number"
            )
        return record

    def keeps(self, record: Record) -> bool:
        """Whether no earlier record is like it, and no benchmark has it; counted either way."""
        count = self.counts[record.part]
        text = record.bare_text
        if self.benchmarks is not None and (name := self.benchmarks.found_in(text)):
            count.contaminated[name] += 1
            return False
        if self._duplicates is not None and not self._duplicates.is_new(text):
            count.duplicates += 1
            return False
        count.kept += 1
        count.heldout += is_heldout(record.id, self._config.heldout_fraction)
        count.lengths.append(self._measure(record.medical_messages))
        return True


def read_record(row: Row, fields: RowConfig, part: str, *, answered: bool) -> Record:
    """The row's record, whose chat has no first system message that says nothing."""
    record = to_record(row, fields, part=part, answered=answered)
    turns = record.messages
    if turns[0]["role"] == "system" and not turns[0]["content"].strip():
        return replace(record, prompt=turns[1:])
    return record
