"""Fakes of the two engines that a run needs, for tests of what stands between them."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from megadistill.types import (
    FloatArray,
    Int32Array,
    Prompt,
    Rollout,
    ScoreRequest,
    Switch,
    TokenScores,
    TokenSpan,
    TopK,
)
from tests.tiny import float32

Value = TypeVar("Value")


@dataclass
class FakeRolloutEngine:
    """Samples three tokens that the seed decides; insists on versions as the real engines do."""

    version: int = 0
    asked: list[tuple[list[str], list[int], int | None]] = field(default_factory=list)
    """(prompt ids, seeds, max_tokens) of every batch."""
    published: list[tuple[int, tuple[Path, ...], str]] = field(default_factory=list)
    before_generate: Callable[[], None] = lambda: None
    asleep: bool = False
    naps: int = 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        expected_version: int,
        max_tokens: int | None = None,
    ) -> list[Rollout]:
        self.asked.append(([prompt.id for prompt in prompts], list(seeds), max_tokens))
        self.before_generate()
        assert not self.asleep
        assert expected_version == self.version, "stale weights"
        return [
            Rollout(
                prompt=prompt,
                response_ids_R=np.asarray([seed % 7, seed % 11, seed % 13], dtype=np.int32),
                logprobs_R=-np.asarray([seed % 5, 1, 2], dtype=np.float32),
                policy_version=self.version,
                finish_reason="stop",
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def publish(self, version: int, files: Sequence[Path], checksum: str) -> None:
        assert not self.asleep
        self.published.append((version, tuple(files), checksum))
        self.version = version

    def sleep(self) -> None:
        assert not self.asleep
        self.asleep = True
        self.naps += 1

    def wake(self) -> None:
        assert self.asleep
        self.asleep = False

    def shutdown(self) -> None:
        raise AssertionError("the collector does not end engines")


@dataclass
class FakeTrainingEngine:
    """One rank of an engine whose log-probs are the negated ids, less what `offsets` says.

    Its weights are one number, which it saves and loads.
    """

    offsets: dict[str, float] = field(default_factory=dict)
    """Model -> how much likelier than the student it finds every token."""
    asked: list[tuple[str, list[list[int]]]] = field(default_factory=list)
    """(model, token ids of the spans) of every call."""
    fetched: list[str] = field(default_factory=list)
    """Models of `prefetch`, until `switches` is asked."""
    weights: float = 0
    rank: int = 0
    meeting: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    board: list[Any] = field(default_factory=lambda: [None])

    @property
    def is_writer(self) -> bool:
        return self.rank == 0

    def score(self, model: str, spans: Sequence[TokenSpan]) -> list[FloatArray]:
        self.asked.append((model, [span.token_ids_N.tolist() for span in spans]))
        offset = self.offsets.get(model, 0.0)
        return [
            (offset - span.token_ids_N[-span.num_scored :]).astype(np.float32) for span in spans
        ]

    def read(
        self,
        model: str,
        spans: Sequence[TokenSpan],
        request: ScoreRequest,
        ids: Sequence[Int32Array] | None = None,
    ) -> list[TokenScores]:
        """The scored token itself and the ids after it, all equally likely, as is every id."""
        found = []
        for index, logprobs_R in enumerate(self.score(model, spans)):
            span, size = spans[index], request.top_k
            top_ids_RK = span.token_ids_N[-span.num_scored :, None] + np.arange(size)
            shape = span.num_scored, size
            equal_RK = np.full(shape, -np.log(max(size, 1) * request.temperature))
            top_k = TopK(ids_RK=top_ids_RK.astype(np.int32), logprobs_RK=float32(equal_RK))
            found.append(
                TokenScores(
                    logprobs_R=logprobs_R,
                    entropy_R=float32(span.token_ids_N[-span.num_scored :] % 3)
                    if request.entropy
                    else None,
                    top_k=top_k if size else None,
                    at_ids_RK=None if ids is None else float32(-ids[index].astype(np.float32)),
                    hidden_RD=torch.full((span.num_scored, 2), self.offsets.get(model, 0.0))
                    if request.hidden
                    else None,
                )
            )
        return found

    def prefetch(self, model: str) -> None:
        self.fetched.append(model)

    def switches(self) -> list[Switch]:
        """One a model that was fetched; it came in no time."""
        found = [Switch(model=m, num_bytes=8, seconds=0.5, waited_s=0.25) for m in self.fetched]
        self.fetched = []
        return found

    def divergences(
        self, student: str, teacher: str, spans: Sequence[TokenSpan]
    ) -> tuple[FloatArray, FloatArray]:
        return float32([self.weights] * len(spans)), float32([2 * self.weights] * len(spans))

    def token_divergences(
        self, student: str, teacher: str, spans: Sequence[TokenSpan]
    ) -> list[FloatArray]:
        rows_12 = float32([[self.weights, 2 * self.weights]])
        return [np.repeat(rows_12, span.num_scored, axis=0) for span in spans]

    def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
        (directory / f"rank-{self.rank}.txt").write_text(str(self.weights))
        if self.is_writer:
            (directory / "extra.json").write_text(json.dumps(extra))
        self.barrier()

    def load(self, directory: Path) -> dict[str, Any]:
        self.weights = float((directory / f"rank-{self.rank}.txt").read_text())
        extra: dict[str, Any] = json.loads((directory / "extra.json").read_text())
        return extra

    def barrier(self) -> None:
        self.meeting.wait(timeout=20)

    def broadcast(self, value: Value) -> Value:
        if self.is_writer:
            self.board[0] = value
        self.barrier()
        received: Value = self.board[0]
        self.barrier()
        return received
