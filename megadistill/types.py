"""The nouns of the project: what flows between prompts, engines, scorer and trainer.

Shape legend: N prompt+response tokens, R response tokens, T packed tokens, W weighted rows, K ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

Message = Mapping[str, str]
"""One chat turn: `{"role": ..., "content": ...}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as the student reads it: rendered by its chat template and tokenized."""

    id: str
    pool: str
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    answer: str | None = None
    """Reference answer; used by SFT only, never part of `messages` or `token_ids`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response to one prompt."""

    prompt: Prompt
    response_ids_R: Int32Array
    """Sampled ids, the end-of-sequence token included when it was sampled."""
    logprobs_R: FloatArray
    """log mu: log-probabilities of the sampled ids in the rollout engine."""
    policy_version: int
    """The weights version that the engine reported while it sampled."""
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSpan:
    """What a model reads, and which tail of it is scored: the last `num_scored` tokens."""

    token_ids_N: Int32Array
    num_scored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """A teacher's K most probable ids at each of R scored tokens."""

    ids_RK: Int32Array
    logprobs_RK: FloatArray
    """Over the full vocabulary, at the temperature that was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A rollout with the training engine's log-probabilities of its response tokens."""

    rollout: Rollout
    branch: str
    student_logprobs_R: FloatArray
    """log pi_theta, training engine."""
    teacher_logprobs_R: FloatArray
    """log pi_T, training engine; of what the teacher reads, which may differ in the prompt."""
    top_k: TopK | None = None
    """Of the teacher, for algorithms that ask for it."""

    @property
    def gap_R(self) -> FloatArray:  # noqa: N802 - R is a shape
        """Delta of CaMOPD section 3: log pi_T - log pi_theta, fp32."""
        return self.teacher_logprobs_R - self.student_logprobs_R


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A training sequence; the loss is -sum of weights x log pi(token) over its scored tail.

    A weight already holds mask, advantage, coefficient and normaliser, so losses only sum.
    """

    span: TokenSpan
    weights_R: FloatArray
    component: str
    """Which metric group the sample belongs to, e.g. `general`, `domain`, `sft`."""
    top_k: TopK | None = None
    """What a teacher expects at each scored token, for losses over its top K."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Several sequences packed without padding between them, as one rank sees them."""

    token_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    cu_seqlens: torch.Tensor
    """int32 [sequences + 1], sequence borders in T."""
    rows_W: torch.Tensor
    """Positions whose hidden state predicts a scored token."""
    targets_W: torch.Tensor
    """The scored tokens' ids."""
    weights_W: torch.Tensor
    """fp32; zeros when only scoring."""
    sample_ids: tuple[int, ...]
    """Index of each packed sequence in the list that was packed."""
    rows_per_sample: tuple[int, ...] = ()
    """How many rows each packed sequence contributed, in order."""
    top_ids_WK: torch.Tensor | None = None
    """A teacher's top-K ids; -1 in the rows of samples without. None where no sample has any."""
    top_logprobs_WK: torch.Tensor | None = None
    """fp32, 0 in the rows of samples without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimizer step reports."""

    loss: float
    grad_norm: float
    """Global gradient norm before clipping."""
    learning_rate: float
    num_tokens: int
    """Tokens that went through forward and backward, over all ranks."""
    metrics: Mapping[str, float] = field(default_factory=dict)


Value = TypeVar("Value")


class Scorer(Protocol):
    """Models by name that score texts; every method is collective."""

    def score(self, model: str, spans: Sequence[TokenSpan]) -> list[FloatArray]:
        """Log-probabilities of each span's scored tail, on every rank."""

    def divergences(
        self, student: str, teacher: str, spans: Sequence[TokenSpan]
    ) -> tuple[FloatArray, FloatArray]:
        """Per span the mean KL(teacher || student) and KL(student || teacher), on every rank."""


class TrainingEngine(Scorer, Protocol):
    """What a run needs of student and teachers beside optimizer steps; `megatron.Engine` is the real one."""

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes files: rank 0."""

    def score_top_k(
        self, model: str, spans: Sequence[TokenSpan], *, top_k: int, temperature: float
    ) -> tuple[list[FloatArray], list[TopK]]:
        """As `score`, and the most probable ids of each scored token."""

    def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
        """Weights, optimizer, random states, and rank 0's `extra` (JSON) into `directory`."""

    def load(self, directory: Path) -> dict[str, Any]:
        """The reverse, in this or another parallel layout; returns `extra`."""

    def barrier(self) -> None:
        """Wait for every rank."""

    def broadcast(self, value: Value) -> Value:
        """Rank 0's value on every rank."""
