"""The nouns of the project: what flows between prompts, engines, scorer and trainer.

Shape legend: N prompt+response tokens, R response tokens, T packed tokens, W weighted rows, S those
of them with one teacher, K ids, D hidden size, V vocabulary rows of a rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from megadistill.config.rows import Message

Int32Array = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


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
    """K ids at each of R scored tokens, and how probable a model finds them.

    Mostly a model's K most probable ids; in a `Sample` the log-probabilities are the teacher's.
    """

    ids_RK: Int32Array
    logprobs_RK: FloatArray
    """Over the full vocabulary, at the temperature that was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """What is asked of a model at every scored token beside the token's log-probability."""

    entropy: bool = False
    """Of its distribution, in nats."""
    top_k: int = 0
    """How many of its most probable ids."""
    temperature: float = 1.0
    """Of the most probable ids and of the log-probabilities at given ids. The scored token's own
    log-probability and the entropy are those of the model as it samples, at 1."""
    hidden: bool = False
    """The hidden state that predicts the token. D numbers a token travel to every rank and wait in
    its host memory: for batches of short responses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What a model says about the scored tokens of one span; None for what nobody asked for."""

    logprobs_R: FloatArray
    entropy_R: FloatArray | None = None
    top_k: TopK | None = None
    """Descending; column 0 is the arg-max."""
    at_ids_RK: FloatArray | None = None
    """Log-probabilities of the ids that were asked about."""
    hidden_RD: torch.Tensor | None = None
    """On the CPU, in the model's type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A rollout with what the training engine says of its response tokens."""

    rollout: Rollout
    branch: str
    student: TokenScores
    teacher: TokenScores
    """Of what the teacher reads, which may differ in the prompt."""
    reference_logprobs_R: FloatArray | None = None
    """log pi_ref of a third model, for advantages that are measured from it."""
    expected_gap_R: FloatArray | None = None
    """-KL(student || teacher) of each token's distribution, for advantages with a baseline."""

    @property
    def student_logprobs_R(self) -> FloatArray:  # noqa: N802 - R is a shape
        """log pi_theta."""
        return self.student.logprobs_R

    @property
    def teacher_logprobs_R(self) -> FloatArray:  # noqa: N802 - R is a shape
        """log pi_T."""
        return self.teacher.logprobs_R

    @property
    def gap_R(self) -> FloatArray:  # noqa: N802 - R is a shape
        """Delta of CaMOPD section 3: log pi_T - log pi_theta, fp32."""
        return self.teacher_logprobs_R - self.student_logprobs_R


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A training sequence; the loss is -sum of weights x log pi(token) over its scored tail, plus
    the sum of divergence weights x divergence from a teacher.

    A weight already holds mask, advantage, coefficient and normaliser, so losses only sum.
    """

    span: TokenSpan
    weights_R: FloatArray
    divergence_weights_R: FloatArray | None = None
    """Of the divergence at each scored token; absent: 0. A token of weight 0 costs nothing."""
    top_k: TopK | None = None
    """The support of a divergence over K ids, with the teacher's log-probabilities there."""
    teacher: str | None = None
    """Whose `hidden_RD` these are."""
    hidden_RD: torch.Tensor | None = None
    """The teacher's hidden states at the scored tokens, for divergences over all ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRows:
    """The rows of a micro-batch where one teacher's whole distribution is compared."""

    rows_S: torch.Tensor
    """Which of the W rows."""
    hidden_SD: torch.Tensor
    weight_VD: torch.Tensor | None = None
    """This rank's rows of the teacher's output projection; the engine puts it here."""


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
    divergence_weights_W: torch.Tensor | None = None
    """fp32, 0 in the rows of samples without. None where no sample has any."""
    teachers: Mapping[str, TeacherRows] = field(default_factory=dict)
    """By name; only rows whose divergence weight is not 0."""
    sample_ids: tuple[int, ...]
    """Index of each packed sequence in the list that was packed."""
    rows_per_sample: tuple[int, ...] = ()
    """How many rows each packed sequence contributed, in order."""
    top_ids_WK: torch.Tensor | None = None
    """Ids of a divergence's support; -1 in the rows of samples without. None where none has any."""
    top_logprobs_WK: torch.Tensor | None = None
    """The teacher's, fp32; 0 in the rows of samples without."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """A frozen model's way to the device."""

    model: str
    num_bytes: int
    """Of this rank's part."""
    seconds: float
    """That the copy took."""
    waited_s: float
    """That somebody waited for it: less where the model was fetched ahead."""


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

    def read(
        self,
        model: str,
        spans: Sequence[TokenSpan],
        request: ScoreRequest,
        ids: Sequence[Int32Array] | None = None,
    ) -> list[TokenScores]:
        """All that `request` asks for at each span's scored tail, and the log-probabilities of its
        `ids` `[R, K]`, on every rank."""

    def token_divergences(
        self, student: str, teacher: str, spans: Sequence[TokenSpan]
    ) -> list[FloatArray]:
        """As `divergences`, of each scored token: `[R, 2]` for each span."""

    def prefetch(self, model: str) -> None:
        """Begin to fetch a teacher that is scored next; nothing to do where all stay in memory."""

    def switches(self) -> list[Switch]:
        """The teachers that came to this rank's device since the last call."""

    def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
        """Weights, optimizer, random states, and rank 0's `extra` (JSON) into `directory`."""

    def load(self, directory: Path) -> dict[str, Any]:
        """The reverse, in this or another parallel layout; returns `extra`."""

    def barrier(self) -> None:
        """Wait for every rank."""

    def broadcast(self, value: Value) -> Value:
        """Rank 0's value on every rank."""
