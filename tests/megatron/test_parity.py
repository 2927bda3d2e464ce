"""Ours against Hugging Face in fp32: scores, losses, gradients and weights, in every layout."""

import math
from pathlib import Path

import pytest

from tests.megatron.ranks import Layout, compare
from tests.megatron.worlds import run_world

pytestmark = [pytest.mark.megatron, pytest.mark.multi, pytest.mark.timeout(600)]

ALL = ("qwen3_untied", "qwen2_tied", "llama3_untied", "llama_tied")
SOME = ("qwen3_untied", "qwen2_tied")
OTHERS = ("llama3_untied", "llama_tied")

LAYOUTS: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "one": ({}, ALL),
    "one recomputed": ({"recompute": "full"}, SOME),
    "one selective": ({"recompute": "selective"}, OTHERS),
    "tp2": ({"tp": 2}, ALL),
    "tp2 sp": ({"tp": 2, "sequence_parallel": True}, SOME),
    "pp2": ({"pp": 2}, ALL),
    "dp2": ({"dp": 2}, OTHERS),
    "cp2": ({"cp": 2}, ALL),
    "tp2 pp2": ({"tp": 2, "pp": 2}, SOME),
    "tp2 pp2 sp recomputed": (
        {"tp": 2, "pp": 2, "sequence_parallel": True, "recompute": "full"},
        SOME,
    ),
    "pp2 dp2": ({"pp": 2, "dp": 2}, SOME),
    "tp2 dp2 sp": ({"tp": 2, "dp": 2, "sequence_parallel": True}, OTHERS),
    "tp2 cp2 sp": ({"tp": 2, "cp": 2, "sequence_parallel": True}, SOME),
    "pp2 cp2": ({"pp": 2, "cp": 2}, OTHERS),
}
LIMITS = {
    "logprob": 1e-5,
    "entropy": 1e-5,
    "gap to itself": 0.0,
    "kl to itself": 0.0,
    "round trip": 0.0,
    "rows": 0.0,
    "loss": 1e-5,
    "gradient": 1e-5,
    "grad norm": 1e-5,
    # Adam divides by the gradient's size: rounding shows where a gradient is tiny.
    "weights": 2e-4,
    "last loss": 1e-5,
}
CASES = [(name, model) for name, (_, models) in LAYOUTS.items() for model in models]

Gaps = dict[tuple[str, str], dict[str, float]]


def world_size(layout: Layout) -> int:
    return math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))


@pytest.fixture(scope="module")
def gaps(models: Path) -> dict[int, Gaps]:
    """Filled by world size as tests ask: one world measures all layouts of its size."""
    return {}


@pytest.mark.parametrize(("name", "model"), CASES)
def test_engine_agrees_with_hugging_face(
    name: str, model: str, gaps: dict[int, Gaps], models: Path
) -> None:
    size = world_size(LAYOUTS[name][0])
    if size not in gaps:
        cases = [(n, LAYOUTS[n][0], m) for n, m in CASES if world_size(LAYOUTS[n][0]) == size]
        gaps[size] = run_world(compare, size, models, cases, timeout_s=560)
    found = gaps[size][name, model]
    too_large = {what: gap for what, gap in found.items() if not gap <= LIMITS[what]}
    assert not too_large
    assert found.keys() == LIMITS.keys()
