"""W5 of the worked examples, and the size confound that the published measure has."""

import numpy as np
import pytest

from megadistill.algorithms.coherence import (
    coherence,
    coherence_gain,
    interference,
    size_matched_gain,
)

GRADIENTS = np.array([[3.0, 0.0], [2.0, 1.0], [-0.5, 0.5], [0.0, -0.5]])


def test_coherence_and_its_gain_are_those_of_the_worked_example() -> None:
    assert coherence(GRADIENTS) == pytest.approx(0.715450, abs=1e-5)
    assert coherence(GRADIENTS[:2]) == pytest.approx(0.973826, abs=1e-6)
    assert coherence_gain(GRADIENTS, [0, 1]) == pytest.approx(36.1129, abs=1e-3)


def test_the_size_matched_gain_approaches_the_mean_over_all_pairs() -> None:
    gain = size_matched_gain(GRADIENTS, [0, 1], num_subsets=4000)
    assert gain == pytest.approx(32.22, abs=1.5)


def test_half_of_orthogonal_gradients_gains_without_any_effect() -> None:
    orthogonal = np.eye(16)
    assert coherence(orthogonal) == pytest.approx(0.25)
    assert coherence_gain(orthogonal, range(8)) == pytest.approx(41.4214, abs=1e-3)
    assert size_matched_gain(orthogonal, range(8)) == pytest.approx(0, abs=1e-9)


def test_opposing_branches_have_a_negative_product() -> None:
    dot, cosine = interference(np.array([1.0, 2.0, -1.0]), np.array([-2.0, 0.5, 0.5]))
    assert dot == pytest.approx(-1.5)
    assert cosine == pytest.approx(-0.288675, abs=1e-6)


def test_no_gradient_is_not_coherent() -> None:
    assert coherence(np.zeros((3, 2))) == 0
