"""The rollout engines as the training loop uses them; `EnginePool` is the real one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megadistill.types import Prompt, Rollout

FIRST_TEACHER_VERSION = 1_000_000
"""Lies above every version of a student, which is the number of its steps."""


def teacher_version(index: int) -> int:
    """Weights version under which a run's `index`-th teacher is published to sample held-out texts."""
    return FIRST_TEACHER_VERSION + index


class RolloutEngine(Protocol):
    """Samples responses with the student's published weights."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        expected_version: int,
        max_tokens: int | None = None,
    ) -> list[Rollout]:
        """One response to each prompt, in the order of `prompts`, all of `expected_version`."""

    def publish(self, version: int, files: Sequence[Path], checksum: str) -> None:
        """Load new weights, and return once every engine has confirmed their checksum."""

    def sleep(self) -> None:
        """Give the GPUs' memory to the trainer (colocated placement); nothing on a CPU."""

    def wake(self) -> None:
        """Take the GPUs' memory back."""

    def shutdown(self) -> None:
        """End the engines' processes."""
