"""Do the branches' gradients pull together, at the student of a run? CaMOPD section 4.4.

The newest rollouts of each branch are scored again by the student as it is at its last whole
checkpoint; every sample gets a backward pass of its own, of which a sketch is kept. One process,
no rollout engines.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from megadistill.algorithms import Mopd, make_algorithm
from megadistill.algorithms.coherence import (
    coherence,
    coherence_gain,
    interference,
    size_matched_gain,
)
from megadistill.algorithms.protocol import response_span
from megadistill.atomic import write_atomic
from megadistill.config import RunConfig
from megadistill.config.schema import ParallelConfig
from megadistill.losses import policy_gradient
from megadistill.megatron.engine import STUDENT, Engine
from megadistill.rollout.store import read_rollouts
from megadistill.rundir import RunDir
from megadistill.startup import common_tokenizer
from megadistill.types import Rollout, Scored, ScoreRequest

Report = dict[str, Any]  # what goes into the JSON file


def probe(run: RunDir, num_samples: int) -> Report:
    """Coherence of each branch's samples, selected and all, and how the branches agree.

    Raises `ValueError` for a run without branches of MOPD's, or without checkpoint or rollouts yet.
    """
    config = run.load_config()
    algorithm = make_algorithm(config, common_tokenizer(config), {})
    if not isinstance(algorithm, Mopd):
        raise ValueError(f"algorithm.kind: found {config.algorithm.kind}, expected mopd or camopd")
    checkpoints = run.whole_checkpoints()
    if not checkpoints:
        raise ValueError(f"{run.path}: found no whole checkpoint, expected one")
    step, directory = checkpoints[-1]
    engine = Engine(_on_one_process(config))
    engine.load(directory)
    report: Report = {"step": step, "branches": {}, "pairs": []}
    sums: dict[str, Any] = {}
    for branch in algorithm.branches:
        rollouts = latest_rollouts(run, branch, step)[:num_samples]
        measured, sums[branch] = measure_branch(engine, algorithm, branch, rollouts)
        report["branches"][branch] = measured
    for first, second in combinations(sums, 2):
        dot, cosine = interference(sums[first], sums[second])
        report["pairs"].append({"branches": [first, second], "dot": dot, "cosine": _number(cosine)})
    engine.close()
    return report


def latest_rollouts(run: RunDir, branch: str, step: int) -> list[Rollout]:
    """A branch's rollouts of the last step that drew from it, up to `step`."""
    for number in range(step, 0, -1):
        file = run.rollout_file(number)
        if file.exists():
            branches = pq.read_table(file, columns=["branch"])["branch"].to_pylist()
            rollouts = zip(read_rollouts(file), branches, strict=True)
            if found := [rollout for rollout, name in rollouts if name == branch]:
                return found
    raise ValueError(f"{run.path}/rollouts: found none of branch {branch} up to step {step}")


def measure_branch(
    engine: Engine, algorithm: Mopd, branch: str, rollouts: Sequence[Rollout]
) -> tuple[Report, Any]:
    """One branch's numbers, and the mean of its samples' gradients (a sketch)."""
    spans = [response_span(rollout) for rollout in rollouts]
    teacher = algorithm.branches[branch].teacher
    plain = ScoreRequest()
    student, taught = (engine.read(name, spans, plain) for name in (STUDENT, teacher))
    scored = [
        Scored(rollout=rollout, branch=branch, student=own, teacher=others)
        for rollout, own, others in zip(rollouts, student, taught, strict=True)
    ]
    selected = algorithm.select(scored).selected
    samples = replace(algorithm, selects=False).select(scored).samples
    gradients_NM = np.stack([engine.sketch([sample], policy_gradient) for sample in samples])
    full = coherence(gradients_NM)
    report: Report = {
        "samples": len(samples),
        "selected": len(selected),
        "coherence_all": full,
        "coherence_selected": coherence(gradients_NM[list(selected)]),
        "gain_percent": coherence_gain(gradients_NM, selected) if full else None,
        "size_matched_gain_percent": size_matched_gain(gradients_NM, selected) if full else None,
    }
    return report, gradients_NM.mean(axis=0)


def table(report: Mapping[str, Any]) -> Table:
    """The report for people: a row a branch."""
    shown = Table(title=f"Gradients after step {report['step']}")
    for column in ("branch", "selected", "Coh (all)", "Coh (selected)", "GCG", "GCG, size-matched"):
        shown.add_column(column)
    for name, row in report["branches"].items():
        gains = (row["gain_percent"], row["size_matched_gain_percent"])
        shown.add_row(
            name,
            f"{row['selected']} of {row['samples']}",
            f"{row['coherence_all']:.4f}",
            f"{row['coherence_selected']:.4f}",
            *("-" if gain is None else f"{gain:+.1f} %" for gain in gains),
        )
    lines = []
    for pair in report["pairs"]:
        cosine = "-" if pair["cosine"] is None else f"{pair['cosine']:+.4f}"
        names = " x ".join(pair["branches"])
        lines.append(f"{names}: dot product {pair['dot']:.4g}, cosine {cosine}")
    shown.caption = "\n".join(lines)
    return shown


def write_probe(run: RunDir, num_samples: int) -> None:
    """Probe a run, write `RUN/report/probe-step-N.json`, and show it."""
    report = probe(run, num_samples)
    file = run.report / f"probe-step-{report['step']:06d}.json"
    write_atomic(file, json.dumps(report, indent=2) + "\n")
    Console().print(table(report), f"written to {file}", sep="\n")


def _on_one_process(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"parallel": ParallelConfig(threads=config.parallel.threads)})


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
