"""Measure the vocabulary head against bare matrix products and its rivals, in one run.

`python tools/bench_head.py` writes JSON, a table and a plot to docs/measurements/, of the GPU where
there is one. Every row runs once a round, all rows in turn, so that a busy machine disturbs them
alike. CPU ratios are of CPU seconds (the least over rounds), which other processes disturb less than
the clock; GPU ratios are of the clock. Set OMP_WAIT_POLICY=passive where processes share the cores.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_head_rows import PRODUCTS, RIVALS, Problem, communication
from matplotlib import pyplot

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "measurements"
FOUR = (PRODUCTS[0], *PRODUCTS)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The sizes of the goals: tokens, hidden, vocabulary.
SIZES = {"cpu": (1024, 576, 49152), "cuda": (32768, 4096, 151936)}
RUNS = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
# Growth, at another size: time should be linear in both, extra memory flat in T.
GROWTH = {
    "cpu": {"hidden": 128, "T": (1024, 2048, 4096, 8192, 16384), "V": (8192, 16384, 32768, 65536, 131072)},
    "cuda": {"hidden": 1024, "T": (4096, 8192, 16384, 32768, 65536), "V": (18992, 37984, 75968, 151936, 303872)},
}  # fmt: skip
GROWTH_AT = {"cpu": (1024, 32768), "cuda": (8192, 151936)}


@dataclass(frozen=True, slots=True)
class Goal:
    """A row's cost in bare products, or how many times as long a rival takes."""

    name: str
    parts: tuple[str, ...]
    base: tuple[str, ...]
    limits: dict[str, float]
    """By "device type"."""
    faster: bool = False


GOALS = (
    Goal("log p + entropy + policy gradient / 3", ("one-pass",), PRODUCTS, {"cpu fp32": 1.2, "cpu bf16": 1.5, "cuda bf16": 1.2}),
    Goal("any upstream gradient / 4", ("two-pass",), FOUR, {"cpu fp32": 1.25, "cuda bf16": 1.2}),
    Goal("teacher log p / 1", ("score",), PRODUCTS[:1], {"cpu fp32": 1.3, "cuda bf16": 1.1}),
    Goal("teacher log p + top-64 / 1", ("score top-64",), PRODUCTS[:1], {"cpu fp32": 1.6, "cuda bf16": 1.25}),
    Goal("gap: student fwd+bwd + teacher / 4", ("one-pass", "score"), FOUR, {"cpu fp32": 1.25, "cuda bf16": 1.2}),
    Goal("reverse KL / 4", ("reverse KL",), FOUR, {"cpu fp32": 1.4, "cuda bf16": 1.25}),
    Goal("JSD / 4", ("JSD",), FOUR, {"cpu fp32": 1.4, "cuda bf16": 1.25}),
    Goal("RAFT's top-512 KL / 4", ("top-512 KL",), FOUR, {}),
    Goal("faster than naive top-512 KL", ("naive top-512 KL",), ("top-512 KL",), {}, True),
    Goal("faster than naive autograd", ("naive",), ("one-pass",), {"cpu fp32": 1.4}, True),
    Goal("faster than chunk-recompute", ("chunk-recompute",), ("one-pass",), {"cpu fp32": 1.7}, True),
    Goal("faster than Liger scaled CE", ("Liger scaled CE",), ("one-pass",), {"cuda bf16": 1.25}, True),
    Goal("faster than Liger's torch path", ("Liger torch path (verl)",), ("one-pass",), {"cuda bf16": 2.5}, True),
    Goal("faster than TRL chunked log-prob", ("TRL chunked log-prob",), ("one-pass",), {}, True),
    Goal("faster than TRL chunked JSD", ("TRL chunked JSD",), ("JSD",), {}, True),
    Goal("faster than Liger JSD", ("Liger JSD",), ("JSD",), {}, True),
)  # fmt: skip


@dataclass(slots=True)
class Row:
    """What one implementation took, over the rounds."""

    cpu_s: list[float]
    wall_s: list[float]
    peak_extra_mb: float | None = None
    missing: str | None = None
    """Why there are no numbers."""


def on_gpu() -> bool:
    """Whether this run measures a GPU."""
    return torch.get_default_device().type == "cuda"


def settle() -> None:
    """Wait until a GPU has done what it was told."""
    if on_gpu():
        torch.cuda.synchronize()


def timed(function: Callable[[], object], row: Row) -> None:
    """Run once and note both clocks."""
    settle()
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    settle()
    row.cpu_s.append(time.process_time() - cpu)
    row.wall_s.append(time.perf_counter() - wall)


def resident_mb(field: str) -> float:
    """`VmRSS` now or `VmHWM`, its maximum."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def peak_extra_mb(function: Callable[[], object]) -> float | None:
    """How much further memory rises while `function` runs; None where nobody can say."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        function()
        settle()
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    if sys.platform != "linux":
        function()
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc kept would hide new memory
    before = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the maximum
    function()
    return resident_mb("VmHWM") - before


def measure(problem: Problem, rounds: int, only: tuple[str, ...] = ()) -> dict[str, Row]:
    """Memory of each implementation first, then rounds of all of them, and of bare products."""
    functions = problem.implementations()
    if only:
        functions = {name: functions[name] for name in only}
    else:
        functions |= {name: lambda run=run: run(problem) for name, run in RIVALS.items()}
    rows = {name: Row([], []) for name in functions}
    for name, function in list(functions.items()):
        problem.clear()
        try:
            if on_gpu():
                function()  # kernels are compiled at their first call
                problem.clear()
            rows[name].peak_extra_mb = peak_extra_mb(function)
        except (ImportError, RuntimeError, TypeError) as error:  # of a rival: its row says why
            if name not in RIVALS:
                raise
            rows[name].missing = f"{type(error).__name__}: {error}".splitlines()[0][:60]
            del functions[name]
    if not only:
        # The products need [T, V] twice; they come after the memory has been measured.
        problem.clear()
        functions |= problem.products()
        rows |= {name: Row([], []) for name in PRODUCTS}
    for _ in range(rounds):
        for name, function in functions.items():
            problem.clear()
            timed(function, rows[name])
    return rows


def ratios(rows: dict[str, Row], kind: str) -> list[dict[str, object]]:
    """Every goal by the time that decides, and by the clock."""
    decides = "wall_s" if on_gpu() else "cpu_s"
    found: list[dict[str, object]] = []
    for goal in GOALS:
        if any(rows[name].missing for name in goal.parts):
            continue
        ways = {"ratio": (decides, min), "wall": ("wall_s", min), "wall_median": ("wall_s", statistics.median)}  # fmt: skip
        values = {}
        for way, (field, pick) in ways.items():
            part, base = (
                sum(pick(getattr(rows[name], field)) for name in names)
                for names in (goal.parts, goal.base)
            )
            values[way] = round(part / base, 3)
        limit = goal.limits.get(kind)
        met = None if limit is None else (values["ratio"] >= limit) == goal.faster
        found.append({"name": goal.name, "kind": kind, **values, "limit": limit, "met": met})
    return found


def memory_goal(rows: dict[str, Row], kind: str) -> list[dict[str, object]]:
    """Peak memory of the one pass beside main_grad: against naive, or in GB."""
    own, dense = rows["one-pass"].peak_extra_mb, rows["naive"].peak_extra_mb
    if own is None:
        return []
    if on_gpu():
        name, value, limit = "extra memory, GB beside main_grad", own * 2**20 / 1e9, 1.6
    elif dense is None:
        return []
    else:
        name, value, limit = "extra memory / naive", own / dense, 0.4
    return [{"name": name, "kind": kind, "ratio": round(value, 3), "limit": limit, "met": value <= limit}]  # fmt: skip


def growth(device: str, rounds: int) -> dict[str, list[dict[str, float | None]]]:
    """Policy gradient at five sizes each of T and V."""
    found: dict[str, list[dict[str, float | None]]] = {"T": [], "V": []}
    tokens_at, vocabulary_at = GROWTH_AT[device]
    sizes = [("T", size, vocabulary_at) for size in GROWTH[device]["T"]]
    sizes += [("V", tokens_at, size) for size in GROWTH[device]["V"]]
    for name, num_tokens, vocab_size in sizes:
        problem = Problem(num_tokens, GROWTH[device]["hidden"], vocab_size, TYPES[RUNS[device][0]])
        row = measure(problem, rounds, only=("one-pass",))["one-pass"]
        size, seconds = (
            num_tokens if name == "T" else vocab_size,
            row.wall_s if on_gpu() else row.cpu_s,
        )
        found[name].append({"size": size, "seconds": min(seconds), "peak_extra_mb": row.peak_extra_mb})  # fmt: skip
    return found


def table(report: dict[str, Any]) -> str:
    """The ratios, then the raw rows, as Markdown."""
    lines = [
        f"# Vocabulary head, {report['machine']}",
        "",
        f"T={report['T']} D={report['D']} V={report['V']}, {report['threads']} threads, "
        f"{report['rounds']} rounds, torch {report['torch']}. The machine's load was "
        f"{report['load_before']:.1f} before and {report['load_after']:.1f} after.",
        "",
        "| ratio | kind | found | wall min | wall median | limit | met |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in report["ratios"]:
        limit, met = r["limit"] or "", {None: "", True: "yes", False: "no"}[r["met"]]
        clock = f"{r.get('wall', '')} | {r.get('wall_median', '')}"
        lines.append(f"| {r['name']} | {r['kind']} | {r['ratio']} | {clock} | {limit} | {met} |")
    lines += ["", "| row | type | CPU s | wall s | peak extra MB |", "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for dtype, rows in report["rows"].items():
        for name, row in rows.items():
            peak = "" if row["peak_extra_mb"] is None else f"{row['peak_extra_mb']:.0f}"
            numbers = (
                row["missing"] or f"{min(row['cpu_s']):.3f} | {min(row['wall_s']):.3f} | {peak}"
            )
            lines.append(f"| {name} | {dtype} | {numbers} |")
    errors = ", ".join(f"{k} {v:.1e}" for k, v in report["error"].items())
    sent = ", ".join(f"{name} {size:.0f}" for name, size in report["bytes_per_token"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"Largest log-prob error against float64: {errors}.",
            "",
            f"Bytes a token that a tensor-parallel rank hands to collectives: {sent}; "
            "beside them the hidden gradient, which Megatron sums as for any output layer.",
            "",
        ]
    )


def plot(report: dict[str, Any], path: Path) -> None:
    """Ratios against their limits, and how time and memory grow with T and V."""
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    shown = [r for r in report["ratios"] if r["limit"]]
    labels = [f"{r['name']} ({r['kind']})" for r in shown]
    left.barh(labels, [r["ratio"] for r in shown], color="#4c78a8", label="measured")
    left.plot([r["limit"] for r in shown], labels, "k|", markersize=16, label="limit")
    left.invert_yaxis()
    left.legend(loc="lower left", bbox_to_anchor=(-0.9, -0.18))
    left.set_title("ratio to bare products, or speed-up")
    for name, points in report["growth"].items():
        sizes = [p["size"] / points[0]["size"] for p in points]
        middle.plot(sizes, [p["seconds"] / points[0]["seconds"] for p in points], "o-", label=name)
        right.plot(sizes, [p["peak_extra_mb"] or 0.0 for p in points], "o-", label=name)
    middle.axline((1, 1), (2, 2), color="grey", linestyle=":")
    middle.set(title="time, relative", xlabel="size, relative", xscale="log", yscale="log")
    right.set(title="peak extra MB beside main_grad", xlabel="size, relative", xscale="log", ylim=(0, None))  # fmt: skip
    for axes in (middle, right):
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure every type of the device, then growth; write JSON, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs=3, metavar=("T", "D", "V"))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    sizes = options.sizes or SIZES[options.device]
    report: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if on_gpu() else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        **dict(zip("TDV", sizes, strict=True)),
        "threads": options.threads,
        "rounds": options.rounds,
        "load_before": os.getloadavg()[0],
        "bytes_per_token": communication(),
        "ratios": [],
        "rows": {},
        "error": {},
    }  # fmt: skip
    measure(Problem(8, 8, 64, torch.float32), 1)  # what the first call of anything allocates
    for name in RUNS[options.device]:
        problem, kind = Problem(*sizes, TYPES[name]), f"{options.device} {name}"
        report["error"][name] = problem.error()
        measured = measure(problem, options.rounds)
        del problem
        report["rows"][name] = {key: asdict(row) for key, row in measured.items()}
        report["ratios"] += ratios(measured, kind) + memory_goal(measured, kind)
    report["growth"] = growth(options.device, 2)
    report["load_after"] = os.getloadavg()[0]
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"head_{'gpu' if on_gpu() else 'cpu'}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(report))
    plot(report, stem.with_suffix(".png"))
    print(table(report))


if __name__ == "__main__":
    main()
