"""What each test world measures: layouts and models for parity, layouts for resuming.

One world of each size does all its jobs, because starting a world costs more than the jobs.
"""

import math
from pathlib import Path
from typing import Any

from tests.megatron.ranks import Layout, compare, overlapped, select
from tests.megatron.resuming import Job, save_then_load_all

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
PARITY = [(name, model) for name, (_, models) in LAYOUTS.items() for model in models]

RESUMING: tuple[Job, ...] = (
    # Tied embeddings over two stages: the optimizer's buffers have padding in their middle.
    ("qwen2_tied", "fp32", ({"pp": 2, "dp": 2}, {"tp": 2, "dp": 2, "sequence_parallel": True})),
    ("qwen3_untied", "fp32", ({"tp": 2, "pp": 2}, {"dp": 4})),
    ("qwen2_tied", "bf16", ({"pp": 2, "dp": 2},)),
)


def world_size(layout: Layout) -> int:
    return math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))


def run_jobs(size: int, directory: Path) -> dict[str, Any]:
    """All jobs of the worlds of this size, on one of its ranks."""
    cases = [(n, LAYOUTS[n][0], m) for n, m in PARITY if world_size(LAYOUTS[n][0]) == size]
    jobs = [job for job in RESUMING if world_size(job[2][0]) == size]
    return {
        "parity": compare(directory, cases),
        "resuming": save_then_load_all(directory, jobs),
        "overlapped": overlapped(directory, "qwen3_untied") if size == 2 else None,
        "selection": select(directory, "qwen3_untied", "llama3_untied") if size <= 2 else None,
    }
