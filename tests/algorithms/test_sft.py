"""Supervised fine-tuning: weights that make the weighted sum the usual cross-entropy."""

import numpy as np
import pytest
import torch

from megadistill.algorithms import Sft
from tests.tiny import decisions, make_prompt, sft_tree

ANSWERS = [(make_prompt("a"), [1, 2, 3, 0]), (make_prompt("b"), [4, 0])]


def test_the_weighted_sum_is_the_mean_over_sequences_of_the_mean_cross_entropy() -> None:
    torch.manual_seed(0)
    samples = Sft(batch_size=2).samples(ANSWERS).samples
    total, expected = 0.0, 0.0
    for sample, (_, ids) in zip(samples, ANSWERS, strict=True):
        logits_RV = torch.randn(len(ids), 6)
        target_R = torch.tensor(ids)
        logprobs_R = logits_RV.log_softmax(-1)[range(len(ids)), target_R]
        total -= float((torch.from_numpy(sample.weights_R) * logprobs_R).sum())
        expected += float(torch.nn.functional.cross_entropy(logits_RV, target_R)) / len(ANSWERS)
    assert total == pytest.approx(expected, rel=1e-6)


def test_only_the_answer_is_scored() -> None:
    sample = Sft(batch_size=2).samples(ANSWERS).samples[1]
    assert sample.span.token_ids_N.tolist() == [11, 12, 13, 4, 0]
    assert sample.span.num_scored == 2
    np.testing.assert_array_equal(sample.weights_R, [0.25, 0.25])


def test_weights_of_a_batch_sum_to_one() -> None:
    samples = Sft(batch_size=2).samples(ANSWERS).samples
    assert sum(float(sample.weights_R.sum()) for sample in samples) == pytest.approx(1.0)


def test_every_step_draws_the_whole_batch() -> None:
    algorithm = decisions(sft_tree())
    assert isinstance(algorithm, Sft)
    assert [dict(algorithm.draws(step)) for step in (0, 5)] == [{"sft": 4}, {"sft": 4}]
