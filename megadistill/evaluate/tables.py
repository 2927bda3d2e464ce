"""The table of a comparison before it is drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megadistill.evaluate.protocol import Block
from megadistill.evaluate.statistics import Interval

BLOCKS: dict[Block, str] = {"general": "General", "domain": "Domain"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One benchmark."""

    name: str
    title: str
    block: Block
    num_items: int


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
        return len(values) > 1 and values.get(system) == max(values.values())

    @property
    def note(self) -> str:
        """What the marks mean."""
        level = 1 - self.confidence
        return (
            f"Scores in points with {self.confidence:.0%} intervals. + / - : better / worse than "
            f"{self.systems[0]} at {level:.2g} (paired tests on the same items, Holm over the table)."
        )
