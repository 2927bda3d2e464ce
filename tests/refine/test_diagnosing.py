"""The figures of the report against the same from numpy, and the report itself."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from megadistill.refine.diagnosing import examples, judge_agreement, measure, sample
from megadistill.refine.report import write_report
from tests.refine.world import WordEncoder

RAW = ["rest and drink water", "take one tablet daily", "call a doctor", "wash your hands"]
NEW = ["rest and drink more water", "take one tablet every day", "call a doctor", "**wash** hands"]
BASE = ["drink tea", "take a walk every day", "see somebody", "wash"]
SIMILARITY = [0.9, 0.85, 0.7, 0.95]


def make_case(n: int) -> dict[str, Any]:
    scores = [{"judge": "a", "score": 0.9}, {"judge": "b", "score": 0.5 + 0.1 * n}]
    row = {
        "id": f"r{n}",
        "question": f"what <b>{n}</b>?",
        "original": RAW[n],
        "rewrite": NEW[n],
        "refined": NEW[n],
        "similarity": SIMILARITY[n],
        "decision": "fused",
        "round": 1 + n % 2,
        "candidates": [{"scores": scores}],
    }
    model = {
        "base": BASE[n],
        "raw_nll": 3.0 + n,
        "refined_nll": 2.5 + 0.9 * n,
        "raw_tokens": 4 + n,
        "refined_tokens": 5 + n,
    }
    return {**row, **model}


CASES = pd.DataFrame([make_case(n) for n in range(4)])


def unit(texts: list[str]) -> npt.NDArray[np.float64]:
    vectors = WordEncoder().encode(texts)
    units: npt.NDArray[np.float64] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return units


def mmd2(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], bandwidth: float) -> float:
    def kernel(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> Any:
        return np.exp(-(np.linalg.norm(a[:, None] - b[None], axis=2) ** 2) / (2 * bandwidth**2))

    off = ~np.eye(len(x), dtype=bool)
    return float(kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean())


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    found = measure(CASES, WordEncoder(), accept=0.8, seed=0)
    return found | {"examples": examples(CASES, 2)}


def test_embedding_figures_match_numpy(values: dict[str, Any]) -> None:
    raw, new, base = unit(RAW), unit(NEW), unit(BASE)
    found = values["embedding"]
    divergence = 1 - (raw * new).sum(1)
    assert found["divergence"] == pytest.approx(divergence.mean())
    assert found["divergence_of_changed"] == pytest.approx(divergence[[0, 1, 3]].mean())
    pool = np.concatenate([raw, new, base])
    distances = np.linalg.norm(pool[:, None] - pool[None], axis=2)[np.triu_indices(12, 1)]
    assert found["bandwidth"] == pytest.approx(np.median(distances))
    assert found["mmd2_raw"] == pytest.approx(mmd2(raw, base, found["bandwidth"]))
    assert found["mmd2_refined"] == pytest.approx(mmd2(new, base, found["bandwidth"]))
    assert found["mmd2_drop"] == pytest.approx(found["mmd2_raw"] - found["mmd2_refined"])


def test_figures_of_likelihood_length_and_overlap(values: dict[str, Any]) -> None:
    assert (values["records"], values["changed"]) == (4, 3)
    nll = values["base_nll"]
    assert nll["before"] == pytest.approx(np.mean([3, 4, 5, 6]))
    assert nll["difference"] == pytest.approx(np.mean([-0.5, -0.6, -0.7, -0.8]))
    assert nll["low"] < nll["difference"] < nll["high"] < 0
    length = values["length"]
    assert length["mean_ratio"] == pytest.approx(np.mean([5 / 4, 6 / 5, 7 / 6, 8 / 7]))
    assert length["wasserstein"] == pytest.approx(1.0)
    kept = [
        sum((Counter(new.split()) & Counter(old.split())).values()) / len(new.split())
        for new, old in (
            ("rest and drink more water", RAW[0]),
            (NEW[1], RAW[1]),
            ("wash hands", RAW[3]),
        )
    ]
    assert values["overlap"]["containment_1"] == pytest.approx(np.mean(kept))
    assert values["overlap"]["copy_rate"] == pytest.approx(np.mean([3 / 5, 3 / 5, 1 / 2]))
    assert values["style"]["bold"]["after"] == pytest.approx(np.mean([0, 0, 0, 100 / 8]))


def test_figures_of_judges(values: dict[str, Any]) -> None:
    judges = values["judges"]
    assert judges["candidates"] == 4
    assert judges["rounds"] == {"1": 2, "2": 2}
    (pair,) = judges["agreement"]
    assert pair["mean_absolute_difference"] == pytest.approx(np.mean([0.4, 0.3, 0.2, 0.1]))
    assert pair["same_side_of_bar"] == 0.25
    assert pair["correlation"] is None  # one of them always says the same


def test_judges_agree_as_far_as_they_do() -> None:
    a, b = [0.9, 0.2, 0.8, 0.5], [0.8, 0.1, 0.7, 0.9]
    scored: list[dict[str, float | None]] = [
        {"a": None, "b": 0.3},
        {"b": 0.5},
    ]
    scored += [{"a": x, "b": y} for x, y in zip(a, b, strict=True)]
    (row,) = judge_agreement(pd.DataFrame(scored, dtype=np.float64), accept=0.8)
    assert row["judges"] == ["a", "b"]
    assert row["candidates"] == 4
    assert row["mean_absolute_difference"] == pytest.approx(np.mean(np.abs(np.subtract(a, b))))
    assert row["correlation"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    # Above the bar: a has 1, 3; b has 1, 4. They agree on 1 and 2; chance is one half.
    assert row["same_side_of_bar"] == 0.5
    assert row["kappa"] == pytest.approx(0.0)


def test_the_worst_and_the_best_are_shown(values: dict[str, Any], tmp_path: Path) -> None:
    assert [row["id"] for row in values["examples"]["worst"]] == ["r1", "r0"]
    assert [row["id"] for row in values["examples"]["best"]] == ["r3", "r0"]
    write_report(tmp_path, json.loads(json.dumps(values)))
    page = (tmp_path / "refinement.html").read_text()
    assert "what &lt;b&gt;1&lt;/b&gt;?" in page
    assert "<b>" not in page
    assert (tmp_path / "refinement.png").read_bytes().startswith(b"\x89PNG")
    assert "judges a and b" in (tmp_path / "refinement.txt").read_text()


def test_the_sample_is_the_same_every_time() -> None:
    rows = [{"id": str(n)} for n in range(50)]
    chosen = sample(rows, 8, seed=1)
    assert chosen == sample(rows[::-1], 8, seed=1)
    assert chosen != sample(rows, 8, seed=2)
    assert len(sample(rows[:3], 8, seed=1)) == 3


def test_a_set_without_changes_is_reported_too(tmp_path: Path) -> None:
    absent = dict.fromkeys(("candidates", "round", "similarity", "base", "raw_nll", "refined_nll"))
    cases = pd.DataFrame([{**make_case(2), **absent}] * 3)
    found = measure(cases, WordEncoder(), accept=None, seed=0)
    write_report(tmp_path, found | {"examples": examples(cases, 2)})
    assert found["changed"] == 0
    assert "-" in (tmp_path / "refinement.txt").read_text()
