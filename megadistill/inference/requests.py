"""A request to a model and its answer, whichever way it goes: in bulk or by HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megadistill.types import Message

_THINKING = "</think>"


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
    """The text after the last `</think>`, without blanks around it."""
    return text.rpartition(_THINKING)[2].strip()
