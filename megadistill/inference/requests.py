"""A request to a model and its answer, whichever way it goes: in bulk or by HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megadistill.config.rows import Message

THOUGHT = "<think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How answers are sampled."""

    samples: int = 1
    """Answers to each prompt, for who makes the requests: a request has one answer."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    repetition_penalty: float = 1.0
    max_tokens: int = 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A chat that a model is to continue with one turn."""

    messages: Sequence[Message]
    sampling: SamplingParams
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatResponse:
    """The turn that a model wrote."""

    text: str
    cut: bool
    """Whether it ran into its cap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """One prompt of bulk work, as token ids."""

    key: int
    """Comes back with the response."""
    token_ids: Sequence[int]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResponse:
    """A model's answer to one prompt, as token ids."""

    key: int
    token_ids: Sequence[int]
    finish_reason: Literal["stop", "length"]


def without_thinking(text: str) -> str:
    """The text outside of thoughts, without blanks around it: nothing of one that never ends.

    A thought that the prompt opens is written with its opening (see `open_thought`).
    """
    return text.rpartition("</think>")[2].partition(THOUGHT)[0].strip()


def open_thought(prompt: str, written: str) -> str:
    """What was written, with the opening of a thought with which the prompt ends."""
    return f"{THOUGHT}{written}" if prompt.rstrip().endswith(THOUGHT) else written
