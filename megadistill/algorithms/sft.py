"""Supervised fine-tuning: cross-entropy on the answers, mean per sequence, then over the batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from megadistill.algorithms.diagnostics import token_means
from megadistill.algorithms.protocol import Loss, Measure, Selection
from megadistill.config.schema import RunConfig
from megadistill.losses import cross_entropy
from megadistill.types import Prompt, Sample, StepResult, TokenSpan


@dataclass(frozen=True)
class Sft:
    """L = (1/N) sum_i (1/T_i) sum_t -log pi(y_t); answer tokens and the end token count."""

    batch_size: int

    def loss(self, measure: Measure) -> Loss:
        """Cross-entropy."""
        return cross_entropy

    def observe(self, result: StepResult) -> dict[str, float]:
        """Nothing to learn."""
        return token_means(result.metrics)

    def state(self) -> dict[str, float]:
        return {}

    def draws(self, step: int) -> Mapping[str, int]:
        """One branch, always."""
        return {"sft": self.batch_size}

    def samples(self, answers: Sequence[tuple[Prompt, Sequence[int]]]) -> Selection:
        """Weights 1 / (N T_i) on the answer tokens."""
        made = [answer_sample(prompt, ids, len(answers)) for prompt, ids in answers]
        lengths = [len(ids) for _, ids in answers]
        return Selection(
            samples=made,
            selected=range(len(made)),
            scores={},
            metrics={"sft/response_tokens": float(np.mean(lengths))},
        )


def make(config: RunConfig, tokenizer: PreTrainedTokenizerBase, state: Mapping[str, float]) -> Sft:
    """It has nothing to set but the batch, and learns nothing of the run."""
    return Sft(config.batch.size)


def answer_sample(prompt: Prompt, answer_ids: Sequence[int], num_samples: int) -> Sample:
    """One of `num_samples` answers: every token weighs 1 / (N T_i)."""
    ids = np.asarray([*prompt.token_ids, *answer_ids], dtype=np.int32)
    weight = 1.0 / (num_samples * len(answer_ids))
    return Sample(
        span=TokenSpan(token_ids_N=ids, num_scored=len(answer_ids)),
        weights_R=np.full(len(answer_ids), weight, dtype=np.float32),
    )
