"""The benchmarks by name, each in a module of its own that is imported when it is used."""

import importlib
from collections.abc import Iterator

from megadistill.evaluate.protocol import Benchmark, Item, benchmark_file, read_benchmark

BENCHMARKS = {
    "ifeval": "ifeval:IFEVAL",
    "medqa": "medical:MEDQA",
    "medxpertqa": "medical:MEDXPERTQA",
    "medical_heldout": "medical:MEDICAL_HELDOUT",
    "coser": "coser:COSER",
    "d_acc": "raft:D_ACC",
    "ms_bench": "raft:MS_BENCH",
    "gpqa_diamond": "verified:GPQA_DIAMOND",
    "hmmt25": "verified:HMMT25",
    "zebralogic": "zebralogic:ZEBRALOGIC",
    "arena_hard_hp": "arena_hard:HARD_PROMPT",
    "arena_hard_cw": "arena_hard:CREATIVE_WRITING",
    "livebench": "recorded:LIVEBENCH",
    "livecodebench_v5": "livecodebench:V5",
    "livecodebench_v6": "livecodebench:V6",
}
"""Name -> `module:NAME` of this package."""

MEASURED = {
    "forward_kl": "heldout:FORWARD_KL",
    "reverse_kl": "heldout:REVERSE_KL",
    "nll": "heldout:NLL",
    "recorded": "recorded:RECORDED",
}
"""What `signals` measures and `recorded` reads; its numbers are compared as a benchmark's are."""


def get_benchmark(name: str) -> Benchmark:
    """A benchmark or other measure. Raises `ValueError` for a name that is neither."""
    known = BENCHMARKS | MEASURED
    if name not in known:
        raise ValueError(f"found benchmark {name!r}, expected one of {', '.join(known)}")
    module, _, constant = known[name].partition(":")
    benchmark: Benchmark = getattr(importlib.import_module(f"{__name__}.{module}"), constant)
    return benchmark


def read_items(name: str, path: str) -> Iterator[Item]:
    """The items of a benchmark's file; `packaged` is the one in its package."""
    benchmark = get_benchmark(name)
    return read_benchmark(benchmark, benchmark_file(benchmark, path))
