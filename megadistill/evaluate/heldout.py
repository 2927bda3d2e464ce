"""What a run measures on held-out prompts, at every evaluation on the same tokens.

Two quantities: the full-vocabulary KL between the student and a teacher, on answers that the teacher
gave once, before training; and the negative log-likelihood of reference answers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from megadistill.algorithms.protocol import response_span
from megadistill.atomic import write_atomic
from megadistill.config.schema import AnswersConfig, HeldoutConfig
from megadistill.data.pools import PromptPool, answer_ids
from megadistill.types import FloatArray, Prompt, Rollout, TokenSpan


class Diverger(Protocol):
    """The training engine as the measurement of divergences sees it."""

    def divergences(
        self, student: str, teacher: str, spans: Sequence[TokenSpan]
    ) -> tuple[FloatArray, FloatArray]:
        """Per span the mean KL(teacher || student) and KL(student || teacher), on every rank."""


class Scorer(Protocol):
    """The training engine as the measurement of likelihoods sees it."""

    def score(self, model: str, spans: Sequence[TokenSpan]) -> list[FloatArray]:
        """Log-probabilities of each span's scored tail, on every rank."""


class Measurer(Diverger, Scorer, Protocol):
    """The training engine as every measurement sees it."""


class Measurement(Protocol):
    """Something held out, measured on the student as it is now."""

    def measure(self, engine: Measurer) -> dict[str, float]:
        """`heldout/NAME/QUANTITY` and `..._stderr` of each. Collective."""


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
                metrics |= _mean(f"heldout/{name}/{quantity}", values)
        return metrics


class HeldoutAnswers:
    """NLL of reference answers, end token included, in nats per token: mean of the answers' means."""

    def __init__(
        self,
        configs: Mapping[str, AnswersConfig],
        pools: Mapping[str, PromptPool],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._texts = {
            name: [
                _answer_span(prompt, answer_ids(prompt, tokenizer))
                for prompt in pools[config.pool].heldout[: config.prompts]
            ]
            for name, config in configs.items()
        }

    def measure(self, engine: Scorer) -> dict[str, float]:
        """`heldout/NAME/nll`, and its standard error over the answers."""
        metrics: dict[str, float] = {}
        for name, spans in self._texts.items():
            scores = engine.score("student", spans)
            means = np.asarray([-float(found.mean()) for found in scores])
            metrics |= _mean(f"heldout/{name}/nll", means)
        return metrics


def _mean(name: str, values: FloatArray | npt.NDArray[np.float64]) -> dict[str, float]:
    """Mean and standard error."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return {name: float(values.mean()), f"{name}_stderr": float(error)}


def _answer_span(prompt: Prompt, ids: Sequence[int]) -> TokenSpan:
    joined = np.asarray([*prompt.token_ids, *ids], dtype=np.int32)
    return TokenSpan(token_ids_N=joined, num_scored=len(ids))


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
