"""Measurements on held-out texts, the same texts every time: by a run while it trains, and by an
evaluation of finished models (`heldout_metrics`).

Two kinds: the full-vocabulary KL between a student and a teacher, on answers that the teacher gave
once; and the negative log-likelihood (NLL) of given answers. Both in nats per token.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from megadistill.algorithms.protocol import response_span
from megadistill.atomic import write_atomic
from megadistill.config.schema import AnswersConfig, HeldoutConfig
from megadistill.data.pools import PromptPool, answer_ids
from megadistill.types import FloatArray, Prompt, Rollout, Scorer, TokenSpan, TrainingEngine

Texts = dict[str, list[TokenSpan]]
"""Name of a measurement -> what it scores."""

SampleFrom = Callable[[str, Sequence[Prompt], int], list[Rollout]]
"""(teacher, prompts, max_tokens) -> the teacher's answers, on every rank."""


def measure_texts(
    engine: Scorer,
    student: str,
    teacher: str | None,
    spans: Sequence[TokenSpan],
    mean: type[np.floating] = np.float32,
) -> dict[str, FloatArray | npt.NDArray[np.float64]]:
    """Quantity -> its value for each text: both divergences to a teacher, without one the NLL.

    `mean`: the precision in which the mean of a text's log-probabilities is taken.
    """
    if teacher is None:
        logprobs = engine.score(student, spans)
        return {"nll": np.asarray([-float(found.mean(dtype=mean)) for found in logprobs])}
    forward, reverse = engine.divergences(student, teacher, spans)
    return {"forward_kl": forward, "reverse_kl": reverse}


@dataclass(frozen=True, slots=True, kw_only=True)
class Heldout:
    """All that a run measures on held-out texts."""

    texts: Texts = field(default_factory=dict)
    teachers: Mapping[str, str] = field(default_factory=dict)
    """Whom a measurement compares with; the others are of the NLL."""

    def measure(self, engine: Scorer) -> dict[str, float]:
        """`heldout/NAME/QUANTITY`, mean over the texts, and `..._stderr` of each. Collective."""
        metrics: dict[str, float] = {}
        for name, spans in self.texts.items():
            found = measure_texts(engine, "student", self.teachers.get(name), spans)
            for quantity, values in found.items():
                key = f"heldout/{name}/{quantity}"
                error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
                metrics |= {key: float(values.mean()), f"{key}_stderr": float(error)}
        return metrics


def teacher_texts(
    configs: Mapping[str, HeldoutConfig],
    pools: Mapping[str, PromptPool],
    file: Path,
    sample: SampleFrom,
    engine: TrainingEngine,
) -> Texts:
    """The teachers' answers, read from `file`, or sampled and written to it. Collective.

    Rank 0 alone looks at the file: a shared filesystem may show it to some ranks only.
    """
    saved = engine.broadcast(_read(file) if engine.is_writer and file.exists() else None)
    if saved is not None:
        return {name: saved[name] for name in configs}
    texts = {
        name: [
            response_span(rollout)
            for rollout in sample(
                config.teacher, pools[config.pool].heldout[: config.prompts], config.max_tokens
            )
        ]
        for name, config in configs.items()
    }
    if engine.is_writer:
        _write(file, texts)
    return texts


def answer_texts(
    configs: Mapping[str, AnswersConfig],
    pools: Mapping[str, PromptPool],
    tokenizer: PreTrainedTokenizerBase,
) -> Texts:
    """Prompts with their reference answers, end token included."""
    return {
        name: [
            text_span(prompt.token_ids, answer_ids(prompt, tokenizer))
            for prompt in pools[config.pool].heldout[: config.prompts]
        ]
        for name, config in configs.items()
    }


def text_span(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> TokenSpan:
    """A prompt and an answer, of which the answer is scored."""
    joined = np.asarray([*prompt_ids, *answer_ids], dtype=np.int32)
    return TokenSpan(token_ids_N=joined, num_scored=len(answer_ids))


def _write(file: Path, texts: Texts) -> None:
    rows = {
        name: [[span.token_ids_N.tolist(), span.num_scored] for span in spans]
        for name, spans in texts.items()
    }
    write_atomic(file, json.dumps(rows))


def _read(file: Path) -> Texts:
    return {
        name: [
            TokenSpan(token_ids_N=np.asarray(ids, dtype=np.int32), num_scored=count)
            for ids, count in rows
        ]
        for name, rows in json.loads(file.read_text()).items()
    }
