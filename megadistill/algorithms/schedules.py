"""Which branches a step draws prompts for, how many, and how much a branch's loss weighs.

A schedule that learns does so in `observe`, and keeps it in `state`, a flat mapping of numbers, so that
a run that is resumed draws what it would have drawn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import numpy as np

from megadistill.algorithms.coherence import agreement, interference
from megadistill.config.algorithm import CamopdConfig, MopdConfig
from megadistill.config.distillation import (
    BranchConfig,
    CounteractionSchedule,
    CycleSchedule,
    GapSchedule,
    VelocitySchedule,
)
from megadistill.config.schema import RunConfig
from megadistill.types import FloatArray

State = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a step saw of one branch; means over its tokens."""

    gap: float
    """Teacher minus student: about -KL(student || teacher)."""
    gap_absolute: float


class BranchSchedule(Protocol):
    """The order of branches."""

    def draws(self, step: int) -> Mapping[str, int]:
        """Branch -> number of prompts at `step` (from 0); active branches only."""

    def factor(self, branch: str) -> float:
        """How much the branch's loss weighs now, beside its `scale`."""

    def observe(self, step: int, readings: Mapping[str, Reading]) -> dict[str, float]:
        """Learn from a step that was taken; returns what is worth logging."""

    def state(self) -> dict[str, float]:
        """What was learnt."""


@dataclass
class Cycle:
    """The same draws over and over: CaMOPD Eq. (5), and mixed batches as a cycle of one step."""

    period: Sequence[Mapping[str, int]]

    def draws(self, step: int) -> Mapping[str, int]:
        return self.period[step % len(self.period)]

    def factor(self, branch: str) -> float:
        return 1.0

    def observe(self, step: int, readings: Mapping[str, Reading]) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, float]:
        return {}


@dataclass
class GapFollowing(Cycle):
    """Open-MOPD (arXiv:2608.19098): a branch weighs more the larger its gap, (m / mean of m)^alpha."""

    config: GapSchedule
    gaps: dict[str, float] = field(default_factory=dict)
    """Moving average of mean |gap|, of every branch that was seen."""

    def factor(self, branch: str) -> float:
        if branch not in self.gaps:
            return 1.0
        reference = float(np.mean(list(self.gaps.values())))
        return gap_factor(self.gaps[branch], reference, self.config)

    def observe(self, step: int, readings: Mapping[str, Reading]) -> dict[str, float]:
        decay = self.config.decay
        for name, reading in readings.items():
            before = self.gaps.get(name, reading.gap_absolute)
            self.gaps[name] = decay * before + (1 - decay) * reading.gap_absolute
        return {f"{name}/schedule_factor": self.factor(name) for name in self.gaps}

    def state(self) -> dict[str, float]:
        return dict(self.gaps)


def gap_factor(gap: float, reference: float, config: GapSchedule) -> float:
    """(gap / reference)^alpha within the bounds; 1 where there is no gap anywhere."""
    if not reference:
        return 1.0
    ratio = gap / reference
    if not ratio and config.alpha < 0:
        return config.high
    return float(np.clip(ratio**config.alpha, config.low, config.high))


@dataclass
class VelocityFollowing:
    """D3-MOPD (arXiv:2608.24987): shares follow what is left of a gap times how fast it closes."""

    config: VelocitySchedule
    batch_size: int
    seed: int
    delay: int
    """Steps whose prompts are drawn before a step is over: new shares wait for the one after."""
    shares: dict[str, float]
    """Branch -> share of the batch now."""
    next_shares: dict[str, float]
    next_from: int = 0
    """Step from which `next_shares` hold."""
    branches: dict[str, "GapHistory"] = field(default_factory=dict)

    def draws(self, step: int) -> Mapping[str, int]:
        shares = self.next_shares if step >= self.next_from else self.shares
        if self.config.jitter:
            generator = np.random.default_rng([self.seed, step])
            noise = generator.uniform(-1, 1, len(shares)) * self.config.jitter
            shares = dict(zip(shares, [*shares.values()] * (1 + noise), strict=True))
        return apportion(self.batch_size, shares)

    def factor(self, branch: str) -> float:
        return 1.0

    def observe(self, step: int, readings: Mapping[str, Reading]) -> dict[str, float]:
        for name, reading in readings.items():
            self.branches.setdefault(name, GapHistory()).add(-reading.gap, self.config)
        if (step + 1) % self.config.every == 0:
            for history in self.branches.values():
                history.remember(self.config)
            if step >= self.next_from:
                self.shares = self.next_shares
            self.next_shares = self._new_shares()
            self.next_from = step + 1 + self.delay
        return {f"{name}/schedule_share": share for name, share in self.next_shares.items()}

    def state(self) -> dict[str, float]:
        found: dict[str, float] = {"next_from": self.next_from}
        for name in self.shares:
            found |= {f"{name}/share": self.shares[name], f"{name}/next": self.next_shares[name]}
        for name, history in self.branches.items():
            found |= {f"{name}/{key}": value for key, value in history.state().items()}
        return found

    def _new_shares(self) -> dict[str, float]:
        """Equal until every branch has a history."""
        histories = [self.branches.get(name) for name in self.shares]
        scores = [h.remaining[-1] * h.velocity() for h in histories if h and len(h.remaining) > 1]
        if len(scores) < len(histories):
            return dict.fromkeys(self.shares, 1 / len(self.shares))
        found = shares_of(scores, self.config.temperature, self.config.floor)
        return dict(zip(self.shares, found, strict=True))


@dataclass
class GapHistory:
    """What is left of one branch's gap, relative to its first observations."""

    count: int = 0
    first: float = 0.0
    """Sum of the first observations."""
    average: float = 0.0
    """Moving average."""
    remaining: list[float] = field(default_factory=list)
    """Remaining gap at the end of each window, the newest last."""

    def add(self, gap: float, config: VelocitySchedule) -> None:
        """One step's gap."""
        if self.count < config.first:
            self.first += gap
        rate = 1 / config.smoothing
        self.average = gap if not self.count else (1 - rate) * self.average + rate * gap
        self.count += 1

    def remember(self, config: VelocitySchedule) -> None:
        """End a window; nothing before there are observations enough to divide by."""
        if self.count >= config.first:
            start = max(self.first / config.first, config.least_first)
            self.remaining = [*self.remaining, self.average / start][-config.windows - 1 :]

    def velocity(self) -> float:
        """Decrease a window, over the windows that are remembered; never below 0."""
        return max((self.remaining[0] - self.remaining[-1]) / (len(self.remaining) - 1), 0.0)

    def state(self) -> dict[str, float]:
        """As numbers by name; `restored` reads them."""
        remaining = {f"remaining_{i}": value for i, value in enumerate(self.remaining)}
        return {"count": self.count, "first": self.first, "average": self.average} | remaining

    @classmethod
    def restored(cls, state: State) -> "GapHistory":
        """The reverse of `state`."""
        indices = range(sum(key.startswith("remaining_") for key in state))
        remaining = [state[f"remaining_{index}"] for index in indices]
        return cls(int(state["count"]), state["first"], state["average"], remaining)


@dataclass(frozen=True, slots=True)
class Block:
    """Some recovering steps, and one of every preserving branch."""

    first: int
    """Its first step."""
    repeats: int
    """Recovering steps."""
    recovered: int = 0
    """Recovering steps before it, which decide whose turn it is."""


@dataclass
class Counteraction:
    """n_g recovering steps, then one of every preserving branch; n_g follows their counteraction."""

    config: CounteractionSchedule
    recovering: Sequence[str]
    preserving: Sequence[str]
    batch_size: int
    delay: int
    """Steps whose prompts are drawn before a step is over: their block keeps its length."""
    block: Block
    """Of a step that was drawn; from there the steps before the next measurement follow."""
    repeats: int
    """n_g of every block after that."""

    def draws(self, step: int) -> Mapping[str, int]:
        block = self._block_of(step)
        place = step - block.first
        if place < block.repeats:
            name = self.recovering[(block.recovered + place) % len(self.recovering)]
        else:
            name = self.preserving[place - block.repeats]
        return {name: self.batch_size}

    def factor(self, branch: str) -> float:
        return 1.0

    def observe(self, step: int, readings: Mapping[str, Reading]) -> dict[str, float]:
        return {"schedule/repeats": self._block_of(step).repeats}

    def learn(self, steps_taken: int, gradients: Mapping[str, FloatArray]) -> dict[str, float]:
        """Take n_g from the branches' gradients after so many steps."""
        recover, preserve = (
            np.mean([gradients[name] for name in names], axis=0)
            for names in (self.recovering, self.preserving)
        )
        _, cosine = interference(recover, preserve)
        cosine = 0.0 if math.isnan(cosine) else cosine
        self.block = self._block_of(steps_taken - 1 + self.delay)
        self.repeats = repeats_for(cosine, self.config.repeats)
        return {"schedule/cosine": cosine, **agreement(gradients)}

    def state(self) -> dict[str, float]:
        return {**asdict(self.block), "next_repeats": self.repeats}

    def _block_of(self, step: int) -> Block:
        block = self.block
        while step >= (end := block.first + block.repeats + len(self.preserving)):
            block = Block(end, self.repeats, block.recovered + block.repeats)
        return block


def repeats_for(cosine: float, repeats: int) -> int:
    """n_g = clip(round(repeats (1 - cosine)), 1, 2 repeats)."""
    return min(max(round(repeats * (1 - cosine)), 1), 2 * repeats)


def counteraction(
    config: CounteractionSchedule,
    branches: Mapping[str, BranchConfig],
    batch_size: int,
    *,
    delay: int,
    state: State,
) -> Counteraction:
    """With what `state` says was learnt."""
    start = {"first": 0, "repeats": config.repeats, "recovered": 0, "next_repeats": config.repeats}
    known = {name: int(value) for name, value in (start | dict(state)).items()}
    repeats = known.pop("next_repeats")
    recovering, preserving = (
        [name for name, branch in branches.items() if branch.role == role]
        for role in ("recover", "preserve")
    )
    return Counteraction(config, recovering, preserving, batch_size, delay, Block(**known), repeats)


def make_schedule(
    algorithm: MopdConfig | CamopdConfig, config: RunConfig, state: Mapping[str, float]
) -> BranchSchedule:
    """The order that `algorithm.schedule` names."""
    size = config.batch.size
    if isinstance(algorithm, CamopdConfig):
        counts = algorithm.schedule
        order = ["general"] * counts.general + ["domain"] * counts.domain
        return Cycle([{name: size} for name in order])
    schedule = algorithm.schedule
    if isinstance(schedule, CycleSchedule):
        return Cycle([{name: size} for name in schedule.order])
    delay = config.rollout.max_staleness if config.rollout else 0
    if isinstance(schedule, CounteractionSchedule):
        return counteraction(schedule, algorithm.branches, size, delay=delay, state=state)
    branches = list(algorithm.branches)
    if isinstance(schedule, VelocitySchedule):
        return velocity_following(
            schedule, branches, size, seed=config.seed, delay=delay, state=state
        )
    period = [apportion(size, shares := first_shares(branches, schedule.shares))]
    if idle := [name for name in branches if name not in period[0]]:
        raise ValueError(
            f"algorithm.schedule.shares: found {shares}, which gives {idle} none of the batch.size = "
            f"{size} prompts of a step, expected at least one for every branch"
        )
    if isinstance(schedule, GapSchedule):
        return GapFollowing(period, schedule, dict(state))
    return Cycle(period)


def velocity_following(
    config: VelocitySchedule,
    branches: Sequence[str],
    batch_size: int,
    *,
    seed: int,
    delay: int,
    state: State,
) -> VelocityFollowing:
    """With what `state` says was learnt."""
    made = VelocityFollowing(
        config, batch_size, seed, delay, (given := first_shares(branches, config.shares)), given
    )
    if state:
        made.next_from = int(state["next_from"])
        made.shares = {name: state[f"{name}/share"] for name in given}
        made.next_shares = {name: state[f"{name}/next"] for name in given}
        for name in given:
            own = {
                k.removeprefix(f"{name}/"): v for k, v in state.items() if k.startswith(f"{name}/")
            }
            if "count" in own:
                made.branches[name] = GapHistory.restored(own)
    return made


def first_shares(branches: Sequence[str], shares: Mapping[str, float] | None) -> dict[str, float]:
    """Shares that add up to 1, in the order of the branches; equal where none are given."""
    given = {name: 1.0 if shares is None else shares.get(name, 0.0) for name in branches}
    return {name: share / sum(given.values()) for name, share in given.items()}


def shares_of(scores: Sequence[float], temperature: float, floor: float) -> list[float]:
    """Soft-max of scores over their largest, each at least `floor`, adding up to 1 (D3-MOPD).

    Equal where no score is above 0: a sampled gap may be below, and then nothing of it remains.
    """
    largest = max(scores)
    raised = [
        math.exp((score / largest - 1) / temperature) if largest > 0 else 1.0 for score in scores
    ]
    bounded = [max(value / sum(raised), floor) for value in raised]
    return [value / sum(bounded) for value in bounded]


def apportion(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers in proportion to `shares`, by the largest remainder; names with 0 are left out.

    A half goes where it makes an even number, as with `round`.
    """
    whole = sum(shares.values())
    exact = [round(total * share / whole, 9) for share in shares.values()]  # 0.7 * 5 is 3.5
    counts = [math.floor(value) for value in exact]

    def rank(index: int) -> tuple[float, int, int]:
        odd = (counts[index] + 1) % 2
        return counts[index] - exact[index], odd, -index if odd else index

    for index in sorted(range(len(exact)), key=rank)[: total - sum(counts)]:
        counts[index] += 1
    return {name: count for name, count in zip(shares, counts, strict=True) if count}
