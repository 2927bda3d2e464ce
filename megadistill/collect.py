"""From a step's number to its training batch: draw, sample, score, select.

Rank 0 alone talks to the rollout engines; every rank holds the whole batch and computes the same
selection, and the training engine shards the work inside itself.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from megadistill.algorithms import OnPolicy, Selection, Supervised
from megadistill.algorithms.protocol import response_span
from megadistill.data.pools import PromptPool, answer_ids
from megadistill.publish.files import Published
from megadistill.rollout.protocol import RolloutEngine
from megadistill.rollout.seeds import seed_for
from megadistill.types import (
    Prompt,
    Rollout,
    Sample,
    Scored,
    TokenScores,
    TokenSpan,
    TrainingEngine,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one step trains on, with everything worth logging about it."""

    branch: str
    """The active branches, joined by `+`."""
    selection: Selection
    scored: Sequence[Scored] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


class Collector(Protocol):
    """Makes the batch of a step; `cursors` counts the prompts ever drawn from each pool."""

    cursors: dict[str, int]

    def collect(self, step: int) -> Batch:
        """The batch of `step`; steps come in order."""


class AnswerCollector:
    """Batches of prompts with their reference answers (SFT)."""

    def __init__(
        self,
        algorithm: Supervised,
        pool: PromptPool,
        tokenizer: PreTrainedTokenizerBase,
        cursors: Mapping[str, int],
    ) -> None:
        self.cursors = {pool.name: 0} | dict(cursors)
        self._algorithm = algorithm
        self._pool = pool
        self._tokenizer = tokenizer

    def collect(self, step: int) -> Batch:
        (count,) = self._algorithm.draws(step).values()
        prompts = self._pool.draw(self.cursors[self._pool.name], count)
        self.cursors[self._pool.name] += count
        pairs = [(prompt, answer_ids(prompt, self._tokenizer)) for prompt in prompts]
        selection = self._algorithm.samples(pairs)
        return Batch(branch="sft", selection=selection, metrics=selection.metrics)


class OnPolicyCollector:
    """Batches of the student's own responses, scored by the active branch's teacher."""

    def __init__(
        self,
        algorithm: OnPolicy,
        pools: Mapping[str, PromptPool],
        engine: TrainingEngine,
        sampler: "Sampler | None",
        cursors: Mapping[str, int],
        responses: int = 1,
    ) -> None:
        """`sampler` is rank 0's access to the engines; the other ranks pass None.

        `responses` are sampled of each prompt that is drawn, behind each other.
        """
        self._branches = algorithm.branches
        drawn = sorted({branch.pool for branch in self._branches.values()})
        self.cursors = dict.fromkeys(drawn, 0) | dict(cursors)
        self._algorithm = algorithm
        self._pools = pools
        self._engine = engine
        self._sampler = sampler
        self._responses = responses

    def collect(self, step: int) -> Batch:
        times: dict[str, float] = {}
        drawn = self._draw(step, self.cursors)
        for branch, prompts in drawn.items():
            self.cursors[self._branches[branch].pool] += len(prompts) // self._responses
        branch_of = [branch for branch, prompts in drawn.items() for _ in prompts]
        with timed(times, "time/rollout"):
            rollouts = self._engine.broadcast(self._sample(step, drawn))
        with timed(times, "time/score"):
            scored = self._score(rollouts, branch_of, times)
            self._engine.prefetch(self._teachers(self._algorithm.draws(step + 1))[0])
        selection = self._algorithm.select(scored)
        tokens = sum(len(rollout.response_ids_R) for rollout in rollouts)
        speed = {"rollout/tokens": tokens, "rollout/tokens_per_s": tokens / times["time/rollout"]}
        if self._sampler is not None and self._sampler.look_ahead:
            times["time/rollout_hidden"] = self._sampler.hidden_s
        metrics = {**selection.metrics, **times, **speed, **self._switches()}
        branch = "+".join(drawn)
        return Batch(branch=branch, selection=selection, scored=scored, metrics=metrics)

    def compare(self, step: int, count: int) -> dict[str, Sequence[Sample]]:
        """Branch -> what would be trained on of the first `count` prompts of its pool.

        From the weights that are published now; the training stream goes on as if nothing had been.
        """
        drawn = {name: self._pools[own.pool].draw(0, count) for name, own in self._branches.items()}
        sampled = self._sampler.aside(step, _flat(drawn)) if self._sampler else []
        branch_of = [branch for branch in drawn for _ in range(count)]
        scored = self._score(self._engine.broadcast(sampled), branch_of, {})
        return {
            branch: self._algorithm.select([s for s in scored if s.branch == branch]).samples
            for branch in drawn
        }

    def _draw(self, step: int, cursors: Mapping[str, int]) -> dict[str, list[Prompt]]:
        positions = dict(cursors)
        drawn: dict[str, list[Prompt]] = {}
        for branch, count in self._algorithm.draws(step).items():
            pool = self._branches[branch].pool
            prompts = self._pools[pool].draw(positions[pool], count)
            drawn[branch] = [prompt for prompt in prompts for _ in range(self._responses)]
            positions[pool] += count
        return drawn

    def _sample(self, step: int, drawn: Mapping[str, list[Prompt]]) -> list[Rollout]:
        """Rank 0's rollouts; nothing on the other ranks."""
        if self._sampler is None:
            return []
        rollouts = self._sampler.get(step, _flat(drawn))
        if self._sampler.look_ahead:
            self._sampler.prefetch(step + 1, _flat(self._draw(step + 1, self.cursors)))
        return rollouts

    def _score(
        self, rollouts: Sequence[Rollout], branch_of: Sequence[str], times: dict[str, float]
    ) -> list[Scored]:
        """Student and teacher log-probs from one engine; only mu came from elsewhere."""
        plan = self._algorithm.scoring
        responses = [response_span(rollout) for rollout in rollouts]
        student = self._engine.read("student", responses, plan.student)
        spans = self._algorithm.teacher_spans(rollouts)
        found: dict[int, Scored] = {}
        for teacher, members in self._members(branch_of).items():
            own = [student[index] for index in members]
            with timed(times, f"time/teacher/{teacher}"):
                taught = self._ask(teacher, [spans[index] for index in members], own)
            for index, scores in zip(members, taught, strict=True):
                found[index] = Scored(
                    rollout=rollouts[index],
                    branch=branch_of[index],
                    student=student[index],
                    teacher=scores,
                )
        scored = [found[index] for index in range(len(rollouts))]
        return self._measured(scored, responses)

    def _teachers(self, branches: Iterable[str]) -> list[str]:
        """In the order in which they score."""
        return list(dict.fromkeys(self._branches[name].teacher for name in branches))

    def _switches(self) -> dict[str, float]:
        """What it took since the last step to bring teachers to the device; nothing on a CPU."""
        found: dict[str, float] = {}
        for switch in self._engine.switches():
            for key, value in (
                (f"time/switch/{switch.model}", switch.seconds),
                (f"time/switch_waited/{switch.model}", switch.waited_s),
                (f"switch/{switch.model}/gib", switch.num_bytes / 2**30),
            ):
                found[key] = found.get(key, 0.0) + value
        return found

    def _members(self, branch_of: Sequence[str]) -> dict[str, list[int]]:
        """Teacher -> indices of the rollouts that it scores: each is loaded once."""
        members: dict[str, list[int]] = {}
        for name in dict.fromkeys(branch_of):
            indices = [index for index, branch in enumerate(branch_of) if branch == name]
            members.setdefault(self._branches[name].teacher, []).extend(indices)
        return members

    def _ask(
        self, teacher: str, spans: Sequence[TokenSpan], student: Sequence[TokenScores]
    ) -> list[TokenScores]:
        """What the algorithm wants to know of a teacher, where it says so at the student's top K."""
        plan = self._algorithm.scoring
        ids = [own.top_k.ids_RK for own in student if own.top_k] if plan.at_student_ids else None
        return self._engine.read(teacher, spans, plan.teacher, ids)

    def _measured(self, scored: list[Scored], spans: Sequence[TokenSpan]) -> list[Scored]:
        """With the reference's log-probabilities and the expected gaps, where they are wanted."""
        plan = self._algorithm.scoring
        if plan.reference is not None:
            logprobs = self._engine.score(plan.reference, spans)
            pairs = zip(scored, logprobs, strict=True)
            scored = [replace(item, reference_logprobs_R=own_R) for item, own_R in pairs]
        if plan.expected_gap:
            for teacher, members in self._members([item.branch for item in scored]).items():
                rows = self._engine.token_divergences(
                    "student", teacher, [spans[index] for index in members]
                )
                for index, rows_R2 in zip(members, rows, strict=True):
                    scored[index] = replace(scored[index], expected_gap_R=-rows_R2[:, 1])
        return scored


class Sampler:
    """Rank 0's rollouts of a step: on demand, or one step ahead of the trainer."""

    def __init__(
        self,
        engines: RolloutEngine,
        *,
        seed: int,
        num_steps: int,
        look_ahead: bool = False,
        colocated: bool = False,
    ) -> None:
        """`colocated` engines sleep whenever they neither sample nor load weights."""
        self.look_ahead = look_ahead
        self.version = 0
        """Weights version that the engines hold."""
        self.hidden_s = 0.0
        """Seconds of the last `get`'s sampling that nobody waited for."""
        self._sampling_s: dict[int, float] = {}
        self._engines = engines
        self._seed = seed
        self._num_steps = num_steps
        self._colocated = colocated
        if colocated:
            engines.sleep()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampler")
        self._pending: dict[int, Future[list[Rollout]]] = {}

    def get(self, step: int, prompts: Sequence[Prompt]) -> list[Rollout]:
        """The rollouts of `step`, from the look-ahead if it is under way."""
        start = time.perf_counter()
        self.prefetch(step, prompts)
        rollouts = self._pending.pop(step).result()
        waited_s = time.perf_counter() - start
        self.hidden_s = max(self._sampling_s.pop(step, 0.0) - waited_s, 0.0)
        return rollouts

    def aside(self, step: int, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Rollouts before `step` outside the training stream, with seeds of their own."""
        return self.generate(prompts, self._seeds(-step, prompts))

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], max_tokens: int | None = None
    ) -> list[Rollout]:
        """Rollouts outside the training stream, from the weights that are published now."""
        with self._awake():
            return self._engines.generate(
                prompts, seeds, max_tokens=max_tokens, expected_version=self.version
            )

    def publish(self, version: int, published: Published) -> None:
        """Load new weights into every engine; they echo version and checksum."""
        with self._awake():
            self._engines.publish(version, published.files, published.checksum)
        self.version = version

    def prefetch(self, step: int, prompts: Sequence[Prompt]) -> None:
        """Start sampling `step` in the background, once, unless the run ends before it."""
        if step not in self._pending and step < self._num_steps:
            version = self.version
            self._pending[step] = self._thread.submit(self._generate, step, prompts, version)

    def wait_pending(self) -> list[Rollout]:
        """Wait for what is under way, without taking it: the rollouts of the next step, if any."""
        return [rollout for future in self._pending.values() for rollout in future.result()]

    def restore_pending(self, step: int, rollouts: list[Rollout]) -> None:
        """Let `get` give these for `step`: what `wait_pending` returned when the run was saved."""
        self._pending[step] = Future()
        self._pending[step].set_result(rollouts)

    def _generate(self, step: int, prompts: Sequence[Prompt], version: int) -> list[Rollout]:
        seeds = self._seeds(step, prompts)
        start = time.perf_counter()
        with self._awake():
            rollouts = self._engines.generate(prompts, seeds, expected_version=version)
        self._sampling_s[step] = time.perf_counter() - start
        return rollouts

    def _seeds(self, step: int, prompts: Sequence[Prompt]) -> list[int]:
        return [seed_for(self._seed, step, one.id, sample) for sample, one in enumerate(prompts)]

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Let colocated engines have the GPUs' memory for the block, however it ends."""
        if not self._colocated:
            yield
            return
        self._engines.wake()
        try:
            yield
        finally:
            self._engines.sleep()


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Add the block's wall-clock seconds to `times[name]`."""
    start = time.perf_counter()
    yield
    times[name] = times.get(name, 0.0) + time.perf_counter() - start


def _flat(drawn: Mapping[str, list[Prompt]]) -> list[Prompt]:
    return [prompt for prompts in drawn.values() for prompt in prompts]
