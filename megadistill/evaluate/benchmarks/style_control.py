"""Arena-Hard's style control: the score that a system would have if its answers differed from the
baseline's in length and markup as much as all systems' do on average.

Every entry of a game is explained by the system and by four differences of style, in one logistic
(Bradley-Terry) fit over all systems. Lengths are in characters; the leaderboard counts tokens.

Shape legend: E entries, K systems and style features, B bootstrap draws.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from megadistill.stats import Array, Interval

FEATURES = ("length", "headers", "lists", "bold")
PREFIX = "style/"
DRAWS = 100
"""As the leaderboard."""
RIDGE = 1e-4
"""Keeps a system that wins every game finite."""
ITERATIONS = 50
_CODE = re.compile(r"```[^`]*```")
_MARKS = (
    re.compile(r"^#{1,6}\s", re.MULTILINE),
    re.compile(r"^\s*(?:\d+\.|[-*+])\s", re.MULTILINE),
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
)


def style_of(answer: str, baseline: str) -> dict[str, float]:
    """The differences of an answer to the baseline's: of length, and of the density of each mark."""
    own, other = _counts(answer), _counts(baseline)
    found = {FEATURES[0]: (own[0] - other[0]) / max(own[0] + other[0], 1)}
    for name, mine, theirs in zip(FEATURES[1:], own[1:], other[1:], strict=True):
        densities = mine / (own[0] + 1), theirs / (other[0] + 1)
        found[name] = (densities[0] - densities[1]) / (sum(densities) + 1)
    return {f"{PREFIX}{name}": value for name, value in found.items()}


def _counts(text: str) -> list[int]:
    prose = _CODE.sub("", text)
    return [len(text), *(len(mark.findall(prose)) for mark in _MARKS)]


def controlled(
    entries: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]], confidence: float
) -> dict[str, Interval]:
    """The score of every system against the baseline with style held equal.

    `entries`: system -> (result, details of its answer) of each game's entries. The interval is of
    bootstrapped entries, as there.
    """
    names = list(entries)
    if not names:
        return {}
    outcomes_E = np.array([value for name in names for value, _ in entries[name]])
    styles = [
        [details[f"{PREFIX}{feature}"] for feature in FEATURES]
        for name in names
        for _, details in entries[name]
    ]
    sizes = [len(entries[name]) for name in names]
    systems = np.repeat(np.eye(len(names)), sizes, axis=0)
    design_EK = np.concatenate([systems, _standardised(np.array(styles))], axis=1)
    random = np.random.default_rng(0)
    draws = [
        fit(design_EK[chosen], outcomes_E[chosen])[: len(names)]
        for chosen in random.integers(len(outcomes_E), size=(DRAWS, len(outcomes_E)))
    ]
    scores_BK = expit(np.stack(draws))
    levels = [0.5, (1 - confidence) / 2, (1 + confidence) / 2]
    return {
        name: Interval(**dict(zip(("value", "low", "high"), quantiles, strict=True)))
        for name, quantiles in zip(names, np.quantile(scores_BK, levels, axis=0).T, strict=True)
    }


def fit(design_EK: Array, outcomes_E: Array) -> Array:
    """Coefficients of the logistic fit, by Newton's method."""
    coefficients_K = np.zeros(design_EK.shape[1])
    ridge = RIDGE * np.eye(len(coefficients_K))
    for _ in range(ITERATIONS):
        chances_E = expit(design_EK @ coefficients_K)
        gradient = design_EK.T @ (chances_E - outcomes_E) + RIDGE * coefficients_K
        weights_E = chances_E * (1 - chances_E)
        step = np.linalg.solve((design_EK.T * weights_E) @ design_EK + ridge, gradient)
        coefficients_K -= step
        if np.abs(step).max() < 1e-9:
            break
    return coefficients_K


def rows_entries(
    rows: Sequence[Mapping[str, Any]], results: Any
) -> list[tuple[float, dict[str, Any]]]:
    """Entries of scored transcripts; `results` (any: a function of two verdicts) as in Arena-Hard."""
    found = []
    for row in rows:
        if row["extracted"] is not None:
            details = json.loads(row["details"])
            found += [(value, details) for value in results(*row["extracted"].split())]
    return found


def _standardised(values: Array) -> Array:
    spread = values.std(axis=0)
    standardised: Array = (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    return standardised
