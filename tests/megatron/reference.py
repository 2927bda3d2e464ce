"""What our engine is compared with: random spans and samples, and the oracle's numbers for them.

Apart from the oracle, so that the ranks of a test world need not import transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megadistill.types import FloatArray, Int32Array, Sample, TokenScores, TokenSpan, TopK

VOCAB_SIZE = 259
"""Odd, so that tensor parallelism must pad it."""


TOP_K, TEMPERATURE = 4, 1.5
"""What a teacher is asked for."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What Hugging Face and torch give in fp32 for one model."""

    spans: list[TokenSpan]
    logprobs: list[FloatArray]
    entropy: float
    """Summed over all scored tokens."""
    tops: list[TopK]
    """At TEMPERATURE."""
    teacher: list[TokenScores]
    """Of the shallow teacher, about the ids of `asked_ids`."""
    distilled: float
    """What the divergence of the test adds to the loss, each sample from its own teacher."""
    supported: float
    """Reverse KL with a tail on the student's own top K, all samples from the shallow teacher."""
    distilled_gradients: dict[str, Tensor]
    """Of policy gradient and divergence, not clipped."""
    kl: float
    """RAFT's L_KL of all samples, where their teacher is `tops` in reverse order of likelihood."""
    samples: list[Sample]
    losses: list[float]
    """Of each of the steps, before it."""
    grad_norms: list[float]
    gradients: dict[str, Tensor]
    """Of the first step, clipped."""
    weights: dict[str, Tensor]
    """After the last step."""
    last_loss: float
    """Of the first sample alone, after the last step."""


def teacher_of(index: int) -> str:
    """Whose divergence a sample takes."""
    return ("shallow", "wide")[index % 2]


def asked_ids(spans: Sequence[TokenSpan]) -> list[Int32Array]:
    """Three ids for each scored token."""
    rng = np.random.default_rng(5)
    return [rng.integers(0, VOCAB_SIZE, (span.num_scored, 3), dtype=np.int32) for span in spans]


def reversed_top_k(top: TopK) -> TopK:
    """The least likely of the ids becomes the most likely one."""
    return TopK(ids_RK=top.ids_RK, logprobs_RK=top.logprobs_RK[:, ::-1].copy())


def random_spans(lengths: Sequence[int], seed: int = 0) -> list[TokenSpan]:
    """Spans of these lengths; about two thirds of each are scored."""
    rng = np.random.default_rng(seed)
    return [
        TokenSpan(token_ids_N=rng.integers(0, VOCAB_SIZE, n, dtype=np.int32), num_scored=2 * n // 3)
        for n in lengths
    ]


def random_samples(lengths: Sequence[int], seed: int = 0) -> list[Sample]:
    """Samples of these lengths with weights of both signs, some zero."""
    rng = np.random.default_rng(seed + 1)
    samples = []
    for span in random_spans(lengths, seed):
        weights = rng.normal(0.3, 1.0, span.num_scored) / len(lengths) / span.num_scored
        weights[rng.random(span.num_scored) < 0.2] = 0.0
        divergence_weights = np.roll(np.abs(weights), 1)
        samples.append(
            Sample(
                span=span,
                weights_R=weights.astype(np.float32),
                divergence_weights_R=divergence_weights.astype(np.float32),
            )
        )
    return samples
