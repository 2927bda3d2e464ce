"""A benchmark: its items, how answers are sampled, what an answer is worth."""

import heapq
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megadistill.config.rows import Location, Message
from megadistill.data.files import BadRowError, Longest, files_of, read_all
from megadistill.data.pools import stable_hash
from megadistill.evaluate.sandbox import Mode
from megadistill.inference.requests import ChatRequest, SamplingParams
from megadistill.refine.blocks import Row
from megadistill.resolve import PACKAGE, resolve

PACKAGED = "packaged"
LONGEST = Longest(512 << 20)
"""LiveCodeBench's hidden tests are large."""
DRAW_SEED = 42
"""RAFT names no seed; ALGORITHMS 2.5 chooses this one."""
Block = Literal["general", "domain", "heldout"]
"""`heldout`: nats per token, where less is better; the others are shares of what is right."""


Fields = Mapping[str, Any]  # a row of a benchmark's file: each knows its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question of a benchmark."""

    id: str
    messages: tuple[Message, ...]
    text: str
    """The question without template: what contamination is looked for with."""
    choices: Mapping[str, str] = field(default_factory=dict)
    """Letter -> text of the options, where an answer is one of their letters."""
    reference: Any = None
    """What the scorer compares with, plain JSON (any: each benchmark knows its own)."""
    group: str = "all"
    """Task or category, where a score is a mean of means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The worth of one answer."""

    value: float
    """From 0 to 1."""
    extracted: str | None = None
    """The final answer that was found in it; None when there was none."""
    weight: float = 1.0
    """Its share in the mean of all."""
    details: Mapping[str, float] = field(default_factory=dict)
    """Further measures, averaged the same way."""
    hole: str | None = None
    """Why there is no score; `value` and `weight` are what the protocol makes of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """Needs of a benchmark that are no package: its own code, and a place where programs may run."""

    checkout: Path
    sandbox: Mode


Chat = Callable[[Iterable[ChatRequest]], Awaitable[str]]
"""A model of a scene: requests, one a try -> the first answer that is not empty."""
MultiTurn = Callable[[Item, Chat, Chat], Awaitable[str]]
"""(item, the system, the judge) -> the scene, as `score_replies` reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A score that another model has a say in."""

    requests: Callable[[Item, str], Sequence[ChatRequest]]
    """Questions to it about an answer; none where rules suffice."""
    parse: Callable[[str], object]
    """A reply as it is read; None: it cannot be, and is asked for once more."""
    score_replies: Callable[[Item, str, Sequence[str]], Score]
    """The score by the replies."""
    votes: bool = False
    """Whether a judge decides right or wrong, so that of several the majority counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One protocol; each file of `benchmarks/` is one."""

    title: str
    rows: Callable[[Fields], Item | None]
    """A row of the file as an item, or None for one of another benchmark in the same file; raises
    `ValueError` or `KeyError` when it is wrong."""
    block: Block = "general"
    sampling: SamplingParams = field(default_factory=SamplingParams)
    score: Callable[[Item, str], Score] | None = None
    run: Callable[[Item, str, Tools], Score] | None = None
    """Scores by running what was written; slow, and many at a time."""
    needs: Path | None = None
    """File that `run` uses of the benchmark's own code."""
    judged: Judged | None = None
    multi_turn: MultiTurn | None = None
    """Makes an answer that takes several turns, with the judge's part in them."""
    remark: Callable[[Mapping[str, Sequence[Row]], float], str] | None = None
    """(system -> scored transcripts, confidence) -> what is said of all of them below a table."""
    packaged: str | None = None
    """Place of the file in a Python package; `path: packaged` means this one."""
    hint: str = ""
    """How to get the file."""
    strip_thinking: bool = True
    """Whether what stands before the last `</think>` is no part of the answer."""
    draws: int | None = None
    """Items drawn from a larger file, the same ones every time; absent: all."""
    groups: Literal["none", "mean_of_means"] = "none"
    """`mean_of_means`: tasks (`category/task`) in categories count the same however long they are."""
    size: int | None = None
    """Items of the whole set."""
    higher_is_better: bool = True

    @property
    def is_share(self) -> bool:
        """Whether a score is a share of what is right, shown in points; else it is nats per token."""
        return self.block != "heldout"


def benchmark_file(benchmark: Benchmark, path: str) -> Path:
    """The file, or the directory of files, that a configuration's `path` means.

    Raises `ValueError` saying how to get it when it is not here.
    """
    if path == PACKAGED and benchmark.packaged is None:
        raise ValueError(f"path: found packaged, but {benchmark.title} comes in no package")
    name = f"{PACKAGE}{benchmark.packaged}" if path == PACKAGED else path
    try:
        return resolve("data", name, key="path")
    except ValueError as error:
        raise ValueError(f"{error}. {benchmark.title}: {benchmark.hint}") from None


def read_benchmark(benchmark: Benchmark, file: Path) -> Iterator[Item]:
    """The items of a file. Raises `ValueError` with the row that is wrong."""
    items = _items(benchmark, files_of(Location("data", str(file))))
    if benchmark.draws is None:
        return items
    return iter(heapq.nsmallest(benchmark.draws, items, key=lambda item: _place(item.id)))


def _place(item_id: str) -> int:
    return stable_hash(f"{DRAW_SEED}/{item_id}")


def _items(benchmark: Benchmark, files: Sequence[Path]) -> Iterator[Item]:
    seen: dict[str, int] = {}
    for row in read_all(files, LONGEST):
        values = row.values
        try:
            item = benchmark.rows({"row": row.number, **values})
        except KeyError as error:
            raise ValueError(f"{row.place} has no field {error}; it has {sorted(values)}") from None
        except BadRowError as error:
            raise error.at(row.place) from None
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from None
        if item is None:
            continue
        if item.id in seen:
            raise ValueError(f"{row.place} has the id {item.id!r} of row {seen[item.id]}")
        seen[item.id] = row.number
        yield item


def user(text: str) -> tuple[Message, ...]:
    """A chat of one turn."""
    return ({"role": "user", "content": text},)
