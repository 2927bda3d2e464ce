"""The decisions of an algorithm, and nothing of how they are carried out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from megadistill.config.distillation import BranchConfig
from megadistill.head import VocabularyHead
from megadistill.types import (
    FloatArray,
    MicroBatch,
    Prompt,
    Rollout,
    Sample,
    Scored,
    ScoreRequest,
    StepResult,
    TokenSpan,
)

Loss = Callable[[VocabularyHead, Tensor, MicroBatch], tuple[Tensor, Mapping[str, Tensor]]]
"""`(head, hidden_WD, micro-batch) -> (sum over rows, named sums over rows)`."""

Measure = Callable[[Loss], Mapping[str, float]]
"""The named sums of a loss over the whole batch of a step, before the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What one step trains on, and what it saw."""

    samples: Sequence[Sample]
    selected: Sequence[int]
    """Indices of the kept rollouts."""
    scores: Mapping[int, float]
    """Score of every rollout, by index."""
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringPlan:
    """What is asked of the models about each token of a response, beside its log-probabilities."""

    student: ScoreRequest = field(default_factory=ScoreRequest)
    teacher: ScoreRequest = field(default_factory=ScoreRequest)
    at_student_ids: bool = False
    """Whether teachers are also asked about the student's most probable ids."""
    reference: str | None = None
    """A further model whose log-probabilities of the response are wanted."""
    expected_gap: bool = False
    """Whether KL(student || teacher) of every token's distribution is wanted."""


class Algorithm(Protocol):
    """Whom a step learns from, and by which loss."""

    def draws(self, step: int) -> Mapping[str, int]:
        """Branch -> number of prompts that it draws at `step` (from 0); active branches only."""

    def loss(self, measure: Measure) -> Loss:
        """The loss of this step's samples."""

    def observe(self, result: StepResult) -> dict[str, float]:
        """Learn from a step that was taken; returns what is worth logging."""

    def state(self) -> dict[str, float]:
        """What `observe` has learnt, for the next attempt at the run."""


class OnPolicy(Algorithm, Protocol):
    """Learns from the student's own responses, scored by a teacher."""

    @property
    def branches(self) -> Mapping[str, BranchConfig]:
        """Pool and teacher of every branch."""

    @property
    def scoring(self) -> ScoringPlan:
        """What is asked of student and teachers about the responses."""

    def teacher_spans(self, rollouts: Sequence[Rollout]) -> list[TokenSpan]:
        """What the teacher reads in place of each prompt and response; scored is the response."""

    def select(self, scored: Sequence[Scored]) -> Selection:
        """Which rollouts are kept, and their token weights."""


@runtime_checkable
class Supervised(Algorithm, Protocol):
    """Learns from the answers that come with the prompts."""

    def samples(self, answers: Sequence[tuple[Prompt, Sequence[int]]]) -> Selection:
        """(prompt, answer ids) pairs to weighted samples."""


@runtime_checkable
class Comparing(Protocol):
    """Learns from how the gradients of its branches agree, at the same weights."""

    def num_compared(self) -> int:
        """Prompts of each branch on which gradients are wanted after this step; mostly 0."""

    def compare(self, gradients: Mapping[str, FloatArray]) -> dict[str, float]:
        """Learn from a sketch of each branch's gradient; returns what is worth logging."""


def response_span(rollout: Rollout) -> TokenSpan:
    """Prompt and response as the student wrote them; every model scores these same ids."""
    prompt_ids = np.asarray(rollout.prompt.token_ids, dtype=np.int32)
    return TokenSpan(
        token_ids_N=np.concatenate([prompt_ids, rollout.response_ids_R]),
        num_scored=len(rollout.response_ids_R),
    )
