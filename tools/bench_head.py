"""Measure the vocabulary head against bare matrix products and plain autograd, in one run.

`python tools/bench_head.py` writes JSON, a table and a plot to docs/measurements/. Every row runs
once a round, all rows in turn, so that a busy machine disturbs them alike. Ratios are of CPU
seconds (the least over rounds), which a busy machine disturbs less than the clock; the clock is
reported beside them. Set OMP_WAIT_POLICY=passive where other processes share the cores.
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
from matplotlib import pyplot
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megadistill.head import VocabularyHead, jsd, logprobs, reverse_kl, score, weighted_nll

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "measurements"
PRODUCTS = ("product: logits", "product: dh", "product: dW")
RECOMPUTE_CHUNK = 256
# Measured at a fixed other size; time should be linear in both, extra memory flat in T.
TOKEN_SIZES, VOCABULARY_AT = (256, 512, 1024, 2048, 4096), 8192
VOCABULARY_SIZES, TOKENS_AT = (8192, 16384, 32768, 65536, 131072), 256


@dataclass(frozen=True, slots=True)
class Goal:
    """A row's cost in bare products, or its speed-up over the policy gradient's rival."""

    name: str
    parts: tuple[str, ...]
    products: tuple[str, ...]
    limits: dict[str, float]
    faster: bool = False


FOUR = (PRODUCTS[0], *PRODUCTS)
GOALS = (
    Goal(
        "log p + entropy + policy gradient / 3", ("one-pass",), PRODUCTS, {"fp32": 1.2, "bf16": 1.5}
    ),
    Goal("any upstream gradient / 4", ("two-pass",), FOUR, {"fp32": 1.25}),
    Goal("teacher log p / 1", ("score",), PRODUCTS[:1], {"fp32": 1.3}),
    Goal("teacher log p + top-64 / 1", ("score top-64",), PRODUCTS[:1], {"fp32": 1.6}),
    Goal("gap: student fwd+bwd + teacher / 4", ("one-pass", "score"), FOUR, {"fp32": 1.25}),
    Goal("reverse KL / 4", ("reverse KL",), FOUR, {"fp32": 1.4}),
    Goal("JSD / 4", ("JSD",), FOUR, {"fp32": 1.4}),
    Goal("faster than naive autograd", ("naive",), ("one-pass",), {"fp32": 1.4}, True),
    Goal("faster than chunk-recompute", ("chunk-recompute",), ("one-pass",), {"fp32": 1.7}, True),
)


@dataclass(slots=True)
class Row:
    """What one implementation took, over the rounds."""

    cpu_s: list[float]
    wall_s: list[float]
    peak_extra_mb: float | None = None


class Problem:
    """Inputs of one size and type, and everything that is timed on them."""

    def __init__(self, num_tokens: int, hidden: int, vocab_size: int, dtype: torch.dtype) -> None:
        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape) * scale).to(dtype)

        torch.manual_seed(0)
        spread = 2.0 / hidden**0.5
        self.hidden_TD = normal(num_tokens, hidden).requires_grad_()
        self.weight_VD = normal(vocab_size, hidden, scale=spread).requires_grad_()
        self.targets_T = torch.randint(vocab_size, (num_tokens,))
        self.weights_T = torch.randn(num_tokens)
        self.teacher_TD = normal(num_tokens, hidden)
        self.head = VocabularyHead(weight_VD=self.weight_VD, vocab_size=vocab_size)
        self.teacher = VocabularyHead(
            weight_VD=normal(vocab_size, hidden, scale=spread), vocab_size=vocab_size
        )

    def clear(self) -> None:
        self.hidden_TD.grad = self.weight_VD.grad = None

    def implementations(self) -> dict[str, Callable[[], object]]:
        ids_T1 = self.targets_T[:, None]
        pair = self.head, self.hidden_TD, self.teacher, self.teacher_TD, self.weights_T
        return {
            "one-pass": lambda: self._backward(
                weighted_nll(self.head, self.hidden_TD, self.targets_T, self.weights_T)[0]
            ),
            "two-pass": lambda: self._backward(
                (logprobs(self.head, self.hidden_TD, ids_T1)[:, 0] * self.weights_T).sum()
            ),
            "score": lambda: score(self.teacher, self.teacher_TD, ids_T1),
            "score top-64": lambda: score(self.teacher, self.teacher_TD, ids_T1, top_k=64),
            "reverse KL": lambda: self._backward(reverse_kl(*pair)[0]),
            "JSD": lambda: self._backward(jsd(*pair)[0]),
            "naive": lambda: self._backward(self._dense(slice(0, len(self.targets_T)))),
            "chunk-recompute": self._chunk_recompute,
        }

    def products(self) -> dict[str, Callable[[], object]]:
        """Three bare products into memory that is there already."""
        hidden_TD, weight_VD = self.hidden_TD.detach(), self.weight_VD.detach()
        tile_TV = hidden_TD.new_empty(len(hidden_TD), len(weight_VD)).normal_()
        out_TV, out_TD = torch.empty_like(tile_TV), torch.empty_like(hidden_TD)
        out_VD = torch.empty_like(weight_VD)
        return {
            PRODUCTS[0]: lambda: torch.mm(hidden_TD, weight_VD.t(), out=out_TV),
            PRODUCTS[1]: lambda: torch.mm(tile_TV, weight_VD, out=out_TD),
            PRODUCTS[2]: lambda: torch.mm(tile_TV.t(), hidden_TD, out=out_VD),
        }

    def error(self) -> float:
        """Largest difference of a log-prob from float64 on the same inputs."""
        found_T = score(self.head, self.hidden_TD, self.targets_T[:, None]).logprobs_TK[:, 0]
        weight_VD, worst = self.weight_VD.detach().double(), 0.0
        for start in range(0, len(found_T), 64):
            rows = slice(start, start + 64)
            logits = self.hidden_TD.detach()[rows].double() @ weight_VD.t()
            expected = logits.log_softmax(-1).gather(1, self.targets_T[rows, None]).squeeze(1)
            worst = max(worst, float((found_T[rows] - expected).abs().max()))
        return worst

    def _backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def _dense(self, rows: slice) -> Tensor:
        logits = (self.hidden_TD[rows] @ self.weight_VD.t()).float()
        picked_C1 = torch.log_softmax(logits, -1).gather(1, self.targets_T[rows, None])
        return -(self.weights_T[rows] * picked_C1.squeeze(1)).sum()

    def _chunk_recompute(self) -> None:
        for start in range(0, len(self.targets_T), RECOMPUTE_CHUNK):
            rows = slice(start, start + RECOMPUTE_CHUNK)
            self._backward(checkpoint(self._dense, rows, use_reentrant=False))


def timed(function: Callable[[], object], row: Row) -> None:
    """Run once and note both clocks."""
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    row.cpu_s.append(time.process_time() - cpu)
    row.wall_s.append(time.perf_counter() - wall)


def resident_mb(field: str) -> float | None:
    """`VmRSS` now or `VmHWM`, its maximum; None where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak_extra_mb(function: Callable[[], object]) -> float | None:
    """How much further resident memory rises while `function` runs."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc kept would hide new memory
    before = resident_mb("VmRSS")
    if before is None:
        return None
    Path("/proc/self/clear_refs").write_text("5")  # resets the maximum
    function()
    peak = resident_mb("VmHWM")
    return None if peak is None else peak - before


def measure(problem: Problem, rounds: int, only: tuple[str, ...] = ()) -> dict[str, Row]:
    """Memory of each implementation first, then rounds of all of them, and of bare products."""
    functions = problem.implementations()
    if only:
        functions = {name: functions[name] for name in only}
    rows = {name: Row([], []) for name in (*functions, *(() if only else PRODUCTS))}
    for name, function in functions.items():
        problem.clear()
        rows[name].peak_extra_mb = peak_extra_mb(function)
    # The products need [T, V] twice; they come after the memory has been measured.
    if not only:
        functions |= problem.products()
    for _ in range(rounds):
        for name, function in functions.items():
            problem.clear()
            timed(function, rows[name])
    return rows


def ratios(rows: dict[str, Row], dtype: str) -> list[dict[str, object]]:
    """Every goal by CPU time (which decides) and by the clock."""

    def total(names: tuple[str, ...], field: str, pick: Callable[[list[float]], float]) -> float:
        return sum(pick(getattr(rows[name], field)) for name in names)

    found: list[dict[str, object]] = []
    for goal in GOALS:
        ways = {
            "cpu": ("cpu_s", min),
            "wall": ("wall_s", min),
            "wall_median": ("wall_s", statistics.median),
        }
        values = {
            way: round(total(goal.parts, field, pick) / total(goal.products, field, pick), 3)
            for way, (field, pick) in ways.items()
        }
        limit = goal.limits.get(dtype)
        met = None if limit is None else (values["cpu"] >= limit) == goal.faster
        found.append({"name": goal.name, "dtype": dtype, **values, "limit": limit, "met": met})
    return found


def scaling(hidden: int, rounds: int) -> dict[str, list[dict[str, float | None]]]:
    """Policy gradient at five sizes each of T and V."""
    found: dict[str, list[dict[str, float | None]]] = {"T": [], "V": []}
    sizes = [("T", size, VOCABULARY_AT) for size in TOKEN_SIZES]
    sizes += [("V", TOKENS_AT, size) for size in VOCABULARY_SIZES]
    for name, num_tokens, vocab_size in sizes:
        problem = Problem(num_tokens, hidden, vocab_size, torch.float32)
        row = measure(problem, rounds, only=("one-pass",))["one-pass"]
        found[name].append(
            {
                "size": num_tokens if name == "T" else vocab_size,
                "cpu_s": min(row.cpu_s),
                "peak_extra_mb": row.peak_extra_mb,
                "weight_gradient_mb": vocab_size * hidden * 4 / 2**20,
            }
        )
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
        "| ratio | dtype | CPU time | wall min | wall median | limit | met |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in report["ratios"]:
        limit, met = r["limit"] or "", {None: "", True: "yes", False: "no"}[r["met"]]
        lines.append(
            f"| {r['name']} | {r['dtype']} | {r['cpu']} | {r['wall']} | {r['wall_median']} "
            f"| {limit} | {met} |"
        )
    lines += [
        "",
        "| row | dtype | CPU s | wall s | peak extra MB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for dtype, rows in report["rows"].items():
        for name, row in rows.items():
            peak = "" if row["peak_extra_mb"] is None else f"{row['peak_extra_mb']:.0f}"
            lines.append(
                f"| {name} | {dtype} | {min(row['cpu_s']):.3f} | {min(row['wall_s']):.3f} | {peak} |"
            )
    errors = ", ".join(f"{k} {v:.1e}" for k, v in report["error"].items())
    lines += ["", f"Largest log-prob error against float64: {errors}.", ""]
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Ratios against their limits, and how time and memory grow with T and V."""
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    shown = [r for r in report["ratios"] if r["limit"]]
    labels = [f"{r['name']} ({r['dtype']})" for r in shown]
    left.barh(labels, [r["cpu"] for r in shown], color="#4c78a8", label="measured (CPU time)")
    left.plot([r["limit"] for r in shown], labels, "k|", markersize=16, label="limit")
    left.invert_yaxis()
    left.legend(loc="lower left", bbox_to_anchor=(-0.9, -0.18))
    left.set_title("ratio to bare products, or speed-up")
    for name, points in report["scaling"].items():
        sizes = [p["size"] / points[0]["size"] for p in points]
        middle.plot(sizes, [p["cpu_s"] / points[0]["cpu_s"] for p in points], "o-", label=name)
        right.plot(
            sizes,
            [(p["peak_extra_mb"] or 0.0) - p["weight_gradient_mb"] for p in points],
            "o-",
            label=name,
        )
    middle.axline((1, 1), slope=1, color="grey", linestyle=":")
    middle.set(title="time, relative", xlabel="size, relative", xscale="log", yscale="log")
    right.set(
        title="peak extra MB beside dW", xlabel="size, relative", xscale="log", ylim=(0, None)
    )
    for axes in (middle, right):
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure both types, then growth; write JSON, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "T": options.tokens,
        "D": options.hidden,
        "V": options.vocabulary,
        "threads": options.threads,
        "rounds": options.rounds,
        "load_before": os.getloadavg()[0],
    }
    measure(Problem(8, 8, 64, torch.float32), 1)  # what the first call of anything allocates
    all_ratios: list[dict[str, object]] = []
    rows: dict[str, object] = {}
    errors: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        problem = Problem(options.tokens, options.hidden, options.vocabulary, dtype)
        measured = measure(problem, options.rounds)
        rows[name] = {key: asdict(row) for key, row in measured.items()}
        all_ratios += ratios(measured, name)
        errors[name] = problem.error()
        del problem
    scaled = scaling(options.hidden, options.rounds)
    report["load_after"] = os.getloadavg()[0]
    report |= {"ratios": all_ratios, "rows": rows, "error": errors, "scaling": scaled}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "head_cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "head_cpu.md").write_text(table(report))
    plot(report, options.output / "head_cpu.png")
    print(table(report))


if __name__ == "__main__":
    main()
