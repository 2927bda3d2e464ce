"""RAFT and SFT as a user starts them: answers learnt, held-out quantities measured, kills without effect."""

import json
from pathlib import Path
from typing import Any

import pytest

from megadistill.metrics import read_metrics
from megadistill.rundir import RunDir, is_whole
from tests.e2e.small_run import (
    WORDS,
    finish,
    kill_when,
    losses,
    make_models,
    start,
    train_command,
    write_run,
)
from tests.tiny import Tree

pytestmark = [pytest.mark.vllm, pytest.mark.megatron, pytest.mark.multi, pytest.mark.slow]
RAFT: Tree = {
    "kind": "raft",
    "pool": "refined",
    "teacher": "original",
    "top_k": 32,
    "teacher_prompt_style": "raw",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("raft")
    make_models(directory)
    rows = [
        {
            "id": f"r{index}",
            "prompt": " ".join(WORDS[(7 * index + place) % 200] for place in range(4 + index % 5)),
            "answer": " ".join(WORDS[(11 * index + place) % 200] for place in range(3 + index % 7)),
        }
        for index in range(40)
    ]
    (directory / "refined.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def write(folder: Path, name: str, algorithm: Tree, **changes: Any) -> Path:
    """A run whose student starts as the original model."""
    original = {"path": str(folder / "general")}
    source = {"kind": "file", "path": str(folder / "refined.jsonl"), "answer": "answer"}
    measured = {"pool": "refined", "teacher": "original", "prompts": 2, "max_tokens": 6}
    tree: Tree = {
        "student": original,
        "teachers": {"original": original},
        "algorithm": algorithm,
        "data": {
            "max_prompt_tokens": 64,
            "heldout_fraction": 0.2,
            "pools": {"refined": {"sources": [source]}},
        },
        "evaluate": {
            "every": 2,
            "heldout": {"texts": measured},
            "answers": {"answers": {"pool": "refined", "prompts": 3}},
        },
    }
    return write_run(folder, name, **(tree | changes))


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunDir:
    """A run of RAFT that nothing disturbed."""
    finish(start(train_command(write(folder, "raft", RAFT))))
    return RunDir(folder / "runs" / "raft")


@pytest.mark.timeout(900)
def test_a_kill_changes_neither_losses_nor_the_balance(folder: Path, undisturbed: RunDir) -> None:
    config = write(folder, "raft-killed", RAFT)
    killed = RunDir(folder / "runs" / "raft-killed")
    kill_when(start(train_command(config)), lambda: is_whole(killed.checkpoint(2)))
    finish(start(train_command(config)))
    assert len(losses(undisturbed)) == 4
    assert losses(undisturbed) == losses(killed)
    rows, again = (read_metrics(run.metrics_file) for run in (undisturbed, killed))
    for metric in ("raft/lambda", "raft/kl", "heldout/answers/nll", "heldout/texts/forward_kl"):
        assert [row.get(metric) for row in rows] == [row.get(metric) for row in again], metric
    # What the teacher reads differs from what the student reads, so there is something to learn.
    assert all(row["raft/kl"] > 0 and row["raft/lambda"] > 0 for row in rows[1:])


@pytest.mark.timeout(600)
def test_sft_measures_what_it_forgets_on_the_same_texts(folder: Path, undisturbed: RunDir) -> None:
    finish(start(train_command(write(folder, "sft", {"kind": "sft", "pool": "refined"}))))
    run = RunDir(folder / "runs" / "sft")
    rows = read_metrics(run.metrics_file)
    measured = {row["step"]: row for row in rows if "heldout/answers/nll" in row}
    assert sorted(measured) == [0, 2, 4]
    forgotten = [measured[step]["heldout/texts/forward_kl"] for step in sorted(measured)]
    assert forgotten[0] == pytest.approx(0, abs=1e-6)
    assert forgotten[2] > forgotten[1] > 1e-4
    # Two recipes that start from one model are measured on the same texts.
    texts = [one.path / "state" / "heldout.json" for one in (undisturbed, run)]
    assert texts[0].read_text() == texts[1].read_text()
