"""Where a refinement keeps what, and what a shard finds there.

RUN/config.yaml               the resolved configuration
RUN/input/KEY/                records.parquet, rejected.json: the input, read once
RUN/stages/NAME/runtime.json  how to compute: what changes no result
RUN/stages/NAME/shards/KEY/   a shard of a stage; KEY hashes what its result depends on
RUN/refined.jsonl, refined.parquet, provenance.parquet, rejected.jsonl, summary.json
RUN/report/                   diagnostics
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megadistill.atomic import write_atomic
from megadistill.data.records import Record
from megadistill.refine.records import load_records

Item = TypeVar("Item")
FIGURES = "figures.json"


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage's directory, `RUN/stages/NAME`."""

    path: Path

    @classmethod
    def of(cls, output: Path) -> "Stage":
        """The stage to which the output directory of a shard belongs."""
        return cls(output.absolute().parents[2])

    @property
    def run(self) -> Path:
        return self.path.parents[1]

    @property
    def runtime(self) -> dict[str, Any]:  # plain JSON values
        """How to compute. It is no part of a shard's identity, and may change between tries."""
        values: dict[str, Any] = json.loads((self.path / "runtime.json").read_text())
        return values

    def write_runtime(self, values: Mapping[str, Any]) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(self.path / "runtime.json", json.dumps(values))

    def records(self, key: str) -> list[Record]:
        """The records of the run's input."""
        return load_records(self.run / "input" / key / "records.parquet")

    def outputs(self, name: str, keys: Sequence[str]) -> list[Path]:
        """The output directories of another stage's shards."""
        return [self.run / "stages" / name / "shards" / key / "output" for key in keys]

    def note_figures(self, output: Path, figures: Mapping[str, float]) -> None:
        """Add what this try did to what earlier tries of the shard did."""
        file = output / FIGURES
        old = json.loads(file.read_text()) if file.exists() else {}
        total = {name: old.get(name, 0) + value for name, value in figures.items()}
        write_atomic(file, json.dumps(total))


def part_of(items: Sequence[Item], part: int, of: int) -> Sequence[Item]:
    """The contiguous share of one of `of` shards; shares differ by at most one item."""
    return items[len(items) * part // of : len(items) * (part + 1) // of]
