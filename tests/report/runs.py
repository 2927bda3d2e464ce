"""Run directories as a trainer and a launcher leave them, made by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megadistill.algorithms import Mopd
from megadistill.collect import Batch
from megadistill.report.rollouts import store_rollouts
from megadistill.rundir import RunDir
from tests.tiny import Tree, decisions, make_config, make_scored, make_tokenizer

Row = dict[str, Any]


def make_run(directory: Path, tree: Tree | None = None) -> RunDir:
    """An empty run directory."""
    run = RunDir(directory)
    run.create(make_config(tree))
    return run


def measured(name: str, reverse: float, forward: float) -> Row:
    return {
        f"heldout/{name}/reverse_kl": reverse,
        f"heldout/{name}/reverse_kl_stderr": 0.01,
        f"heldout/{name}/forward_kl": forward,
        f"heldout/{name}/forward_kl_stderr": 0.02,
    }


def step_row(step: int, branch: str, **changes: Any) -> Row:
    row = {
        "step": step,
        "branch": branch,
        "loss": -0.1234,
        "grad_norm": 3.21,
        f"{branch}/gap": -0.25,
        f"{branch}/gap_absolute": 0.5,
        f"{branch}/selected_fraction": 0.75,
        "rollout/tokens_per_s": 123.4,
        "train/tokens_per_s": 55.0,
        "time/step": 2.0,
    }
    return row | changes


ROWS: list[Row] = [
    {"step": 0, "branch": "start", **measured("general", 0.8, 0.6), **measured("domain", 0.0, 0.0)},
    step_row(1, "general"),
    step_row(2, "general", **measured("general", 0.5, 0.5), **measured("domain", 0.1, 0.1)),
    step_row(3, "domain"),
    step_row(4, "general", **measured("general", 0.2, 0.3), **measured("domain", 0.05, 0.04)),
]


def write_rows(run: RunDir, rows: list[Row]) -> None:
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_end(run: RunDir, attempt: int, end: Mapping[str, Any]) -> None:
    """What node 0 declares when an attempt has ended."""
    directory = run.path / "control" / f"attempt-{attempt}"
    directory.mkdir(exist_ok=True)
    (directory / "ended.json").write_text(json.dumps(end))


def write_rollouts(run: RunDir, step: int, lengths: tuple[int, ...] = (3, 2)) -> None:
    """Rollouts of these lengths, with one strong gap in each."""
    algorithm = decisions()
    assert isinstance(algorithm, Mopd)
    scored = [
        make_scored(
            [-0.5] * length, [-0.5 - 3.0 / (1 + n), *[-0.3] * (length - 1)], prompt_id=f"p{n}"
        )
        for n, length in enumerate(lengths)
    ]
    batch = Batch(branch="general", selection=algorithm.select(scored), scored=scored)
    store_rollouts(run.rollout_file(step), batch)


def write_tokenizer(directory: Path, words: str) -> None:
    """The student's tokenizer: ids from 5 are the words in alphabetical order."""
    make_tokenizer([words]).save_pretrained(directory)
