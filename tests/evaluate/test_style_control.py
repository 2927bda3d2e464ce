"""Style control against a general optimiser, and on games that style alone decides."""

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from megadistill.evaluate.benchmarks import arena_hard, get_benchmark
from megadistill.evaluate.benchmarks.style_control import (
    FEATURES,
    PREFIX,
    controlled,
    fit,
    style_of,
)

Entries = list[tuple[float, dict[str, Any]]]


def styled(**values: float) -> dict[str, float]:
    return {f"{PREFIX}{name}": values.get(name, 0.0) for name in FEATURES}


def games(strength: float, style: float, count: int, seed: int) -> Entries:
    """Entries of a system whose answers win by their strength, and by their length."""
    random = np.random.default_rng(seed)
    found: Entries = []
    for _ in range(count):
        length = random.normal(1.0, 0.5)
        chance = 1 / (1 + np.exp(-(strength + style * length)))
        marks = {name: random.normal() for name in FEATURES[1:]}
        found.append((float(random.random() < chance), styled(length=length, **marks)))
    return found


def test_the_fit_is_the_most_likely_one() -> None:
    random = np.random.default_rng(0)
    design = random.normal(size=(300, 4))
    outcomes = (random.random(300) < 0.6).astype(float)
    outcomes[::7] = 0.5

    def loss(coefficients: Any) -> float:
        logits = design @ coefficients
        return float((np.logaddexp(0, logits) - outcomes * logits).sum())

    expected = minimize(loss, np.zeros(4), tol=1e-10).x
    assert fit(design, outcomes) == pytest.approx(expected, abs=1e-3)


def test_a_system_that_wins_by_length_alone_is_as_good_as_the_baseline() -> None:
    entries = {"long": games(0.0, 2.0, 4000, 1), "same": games(-2.0, 2.0, 4000, 2)}
    plain = {name: np.mean([value for value, _ in given]) for name, given in entries.items()}
    found = controlled(entries, 0.9)
    assert plain["long"] > 0.8
    # Standardised features hold style at the mean of all answers, not at the baseline's.
    gap = np.log(found["long"].value / (1 - found["long"].value))
    gap -= np.log(found["same"].value / (1 - found["same"].value))
    assert gap == pytest.approx(2.0, abs=0.25)
    assert found["long"].low < found["long"].value < found["long"].high


def test_without_any_difference_of_style_the_score_is_the_mean() -> None:
    entries: Entries = [(value, styled()) for value in (1.0, 1.0, 0.5, 0.0)] * 50
    assert controlled({"a": entries}, 0.9)["a"].value == pytest.approx(0.625, abs=0.03)
    always: Entries = [(1.0, styled())] * 20
    assert controlled({"a": always}, 0.9)["a"].value > 0.99
    assert controlled({}, 0.9) == {}


def test_style_is_counted_outside_of_code() -> None:
    answer = "# Head\n- one\n1. two\n**bold** __too__\n```\n# no\n- no\n```"
    found = style_of(answer, "plain text")
    assert found[f"{PREFIX}length"] == pytest.approx((len(answer) - 10) / (len(answer) + 10))
    density = 1 / (len(answer) + 1)
    assert found[f"{PREFIX}headers"] == pytest.approx(density / (density + 1))
    assert found[f"{PREFIX}lists"] == pytest.approx(2 * density / (2 * density + 1))
    assert found[f"{PREFIX}bold"] == pytest.approx(2 * density / (2 * density + 1))
    assert set(style_of(answer, answer).values()) == {0.0}
    assert set(style_of("", "").values()) == {0.0}


def test_the_table_says_it_below() -> None:
    row = {"extracted": "A>B B>>A", "details": '{"style/length": 0, "style/headers": 0, '}
    row["details"] += '"style/lists": 0, "style/bold": 0}'
    silent = {"extracted": None, "details": "{}"}
    remark = get_benchmark("arena_hard_hp").remark
    assert remark is not None
    said = remark({"x": [row, silent] * 9, "none": [silent]}, 0.95)
    assert said.startswith("Arena-Hard v2 HP with style control: x 0.")
    assert arena_hard.entries("A>B", "B>>A") == [0.0, 0.0, 0.0, 0.0]
