"""The table of a comparison before it is drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megadistill.evaluate.protocol import Block
from megadistill.stats import Interval

BLOCKS: dict[Block, str] = {
    "general": "General",
    "domain": "Domain",
    "heldout": "Held out (nats per token, less is better)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One benchmark."""

    name: str
    title: str
    block: Block
    num_items: int

    @property
    def in_points(self) -> bool:
        """Whether it is a share of what is right, shown in percent; more is better."""
        return self.block != "heldout"

    @property
    def scale(self) -> float:
        """Shown is the score times this."""
        return 100.0 if self.in_points else 1.0

    def shown(self, value: float) -> str:
        """A score as tables have it."""
        return f"{value * self.scale:.1f}" if self.in_points else f"{value:.3f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A score with what is known of its difference to the baseline's."""

    interval: Interval
    p_value: float | None = None
    """Adjusted for the number of tests; None for the baseline itself."""
    significant: bool = False
    better: bool = False

    @property
    def mark(self) -> str:
        """`+` significantly better than the baseline, `-` significantly worse."""
        return ("+" if self.better else "-") if self.significant else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Systems by benchmarks, the columns in blocks."""

    systems: Sequence[str]
    columns: Sequence[Column]
    cells: Mapping[tuple[str, str], Cell]
    confidence: float
    remarks: Sequence[str] = ()
    """Sentences that stand below."""

    @property
    def blocks(self) -> list[tuple[Block, list[Column]]]:
        """The blocks that have columns."""
        found = [(b, [column for column in self.columns if column.block == b]) for b in BLOCKS]
        return [(block, columns) for block, columns in found if columns]

    def average(self, system: str, columns: Sequence[Column]) -> float | None:
        """Mean score of a block; None where one is missing."""
        places = [(system, column.name) for column in columns]
        if any(place not in self.cells for place in places):
            return None
        return sum(self.cells[place].interval.value for place in places) / len(places)

    def is_best(self, system: str, column: Column) -> bool:
        values = {
            name: self.cells[name, column.name].interval.value
            for name in self.systems
            if (name, column.name) in self.cells
        }
        best = max if column.in_points else min
        return len(values) > 1 and values.get(system) == best(values.values())

    @property
    def note(self) -> str:
        """What the marks mean."""
        level = 1 - self.confidence
        nats = "" if all(column.in_points for column in self.columns) else ", KL and NLL in nats"
        marks = (
            f"Scores in points{nats} with {self.confidence:.0%} intervals. + / - : better / worse than "
            f"{self.systems[0]} at {level:.2g} (paired tests on the same items, Holm over the table)."
        )
        return " ".join([marks, *self.remarks])
