"""What an algorithm decides, and nothing of how it is carried out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megadistill.types import Phase, Prompt, Rollout, Sample, Scored, TokenSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What one step trains on, and what it saw."""

    samples: Sequence[Sample]
    selected: Sequence[int]
    """Indices of the kept rollouts."""
    scores: Mapping[int, float]
    """Score of every rollout, by index."""
    metrics: Mapping[str, float]


class Algorithm(Protocol):
    """Whom a step learns from."""

    def phase(self, step: int) -> Phase:
        """The active branches and how many prompts each draws at `step` (from 0)."""


class OnPolicy(Algorithm, Protocol):
    """Learns from the student's own responses, scored by a teacher."""

    def select(self, scored: Sequence[Scored]) -> Selection:
        """Which rollouts are kept, and their token weights."""


class Supervised(Algorithm, Protocol):
    """Learns from the answers that come with the prompts."""

    def samples(self, answers: Sequence[tuple[Prompt, Sequence[int]]]) -> Selection:
        """(prompt, answer ids) pairs to weighted samples."""


def response_span(rollout: Rollout) -> TokenSpan:
    """Prompt and response as the student wrote them; every model scores these same ids."""
    prompt_ids = np.asarray(rollout.prompt.token_ids, dtype=np.int32)
    return TokenSpan(
        token_ids_N=np.concatenate([prompt_ids, rollout.response_ids_R]),
        num_scored=len(rollout.response_ids_R),
    )
