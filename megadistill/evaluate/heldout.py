"""Full-vocabulary KL between the student and a teacher, on the teacher's own held-out answers.

The texts are sampled from the teacher once, before training, so every step is measured on the
same tokens and the curve shows the student's change alone.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from megadistill.algorithms.protocol import response_span
from megadistill.config.schema import HeldoutConfig
from megadistill.data.pools import PromptPool
from megadistill.rundir import write_atomic
from megadistill.types import FloatArray, Prompt, Rollout, TokenSpan


class Diverger(Protocol):
    """The training engine as this measurement sees it."""

    def divergences(
        self, student: str, teacher: str, spans: Sequence[TokenSpan]
    ) -> tuple[FloatArray, FloatArray]:
        """Per span the mean KL(teacher || student) and KL(student || teacher), on every rank."""


Value = TypeVar("Value")


class Ranks(Protocol):
    """The other processes as this measurement sees them."""

    @property
    def is_writer(self) -> bool:
        """Whether this is rank 0."""

    def broadcast(self, value: Value) -> Value:
        """Rank 0's value on every rank."""


SampleFrom = Callable[[str, Sequence[Prompt], int], list[Rollout]]
"""(teacher, prompts, max_tokens) -> the teacher's answers, on every rank."""


class HeldoutKl:
    """All held-out measurements of a run."""

    def __init__(
        self, texts: Mapping[str, Sequence[TokenSpan]], teachers: Mapping[str, str]
    ) -> None:
        self._texts = texts
        self._teachers = teachers

    @classmethod
    def prepare(
        cls,
        configs: Mapping[str, HeldoutConfig],
        pools: Mapping[str, PromptPool],
        file: Path,
        sample: SampleFrom,
        ranks: Ranks,
    ) -> "HeldoutKl":
        """Read the teachers' answers from `file`, or sample them and write it. Collective.

        Rank 0 alone looks at the file: a shared filesystem may show it to some ranks only.
        """
        teachers = {name: config.teacher for name, config in configs.items()}
        saved = ranks.broadcast(_read(file) if ranks.is_writer and file.exists() else None)
        if saved is not None:
            return cls(saved, teachers)
        texts = {
            name: [
                response_span(rollout)
                for rollout in sample(
                    config.teacher, pools[config.pool].heldout[: config.prompts], config.max_tokens
                )
            ]
            for name, config in configs.items()
        }
        if ranks.is_writer:
            _write(file, texts)
        return cls(texts, teachers)

    def measure(self, engine: Diverger) -> dict[str, float]:
        """`heldout/NAME/forward_kl`, `.../reverse_kl`, and the standard error of each."""
        metrics: dict[str, float] = {}
        for name, spans in self._texts.items():
            found = engine.divergences("student", self._teachers[name], spans)
            for quantity, values in zip(("forward_kl", "reverse_kl"), found, strict=True):
                metrics[f"heldout/{name}/{quantity}"] = float(values.mean())
                error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
                metrics[f"heldout/{name}/{quantity}_stderr"] = float(error)
        return metrics


def _write(file: Path, texts: Mapping[str, Sequence[TokenSpan]]) -> None:
    rows = {
        name: [[span.token_ids_N.tolist(), span.num_scored] for span in spans]
        for name, spans in texts.items()
    }
    write_atomic(file, json.dumps(rows))


def _read(file: Path) -> dict[str, list[TokenSpan]]:
    return {
        name: [
            TokenSpan(token_ids_N=np.asarray(ids, dtype=np.int32), num_scored=count)
            for ids, count in rows
        ]
        for name, rows in json.loads(file.read_text()).items()
    }
