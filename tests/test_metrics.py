"""The metric file: every line whole, resumed runs without doubles, and Weights & Biases beside it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.config.schema import LogConfig
from megadistill.metrics import MetricWriter, read_metrics, wandb_id

OFF = LogConfig(wandb="off")


def write_steps(file: Path, steps: range, steps_taken: int = 0) -> None:
    writer = MetricWriter(file, OFF, "tiny", steps_taken)
    for step in steps:
        writer.write(step, {"loss": step / 4})
    writer.close()


def steps_in(file: Path) -> list[int]:
    return [row["step"] for row in read_metrics(file)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a run's metrics go."""
    return tmp_path / "metrics.jsonl"


def test_metrics_are_one_json_line_a_step(file: Path) -> None:
    write_steps(file, range(3))
    lines = file.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "loss": 0.0},
        {"step": 1, "loss": 0.25},
        {"step": 2, "loss": 0.5},
    ]


def test_a_line_is_on_disk_when_write_returns(file: Path) -> None:
    writer = MetricWriter(file, OFF, "tiny", 0)
    writer.write(0, {"loss": 1.0, "branch": "start"})
    assert read_metrics(file) == [{"step": 0, "loss": 1.0, "branch": "start"}]


def test_a_run_without_metrics_has_none(file: Path) -> None:
    assert read_metrics(file) == []


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3', "{", '"step"', "\0\0\0"])
def test_a_torn_last_line_is_left_out(file: Path, torn: str) -> None:
    write_steps(file, range(3))
    with file.open("a") as stream:
        stream.write(torn)
    assert steps_in(file) == [0, 1, 2]


def test_a_resumed_run_drops_the_lines_it_will_repeat(file: Path) -> None:
    write_steps(file, range(6))
    with file.open("a") as stream:
        stream.write('{"step": 6, "lo')
    write_steps(file, range(4, 5), steps_taken=3)
    assert steps_in(file) == [0, 1, 2, 3, 4]


def test_a_run_that_starts_anew_keeps_nothing(file: Path) -> None:
    write_steps(file, range(2))
    write_steps(file, range(1), steps_taken=0)
    assert steps_in(file) == [0]


def test_numbers_come_back_exactly(file: Path) -> None:
    writer = MetricWriter(file, OFF, "tiny", 0)
    values = {"a": 0.1 + 0.2, "b": 1e-308, "c": math.inf, "d": -0.0}
    writer.write(0, values)
    assert read_metrics(file) == [{"step": 0, **values}]


def test_not_a_number_survives(file: Path) -> None:
    MetricWriter(file, OFF, "tiny", 0).write(0, {"loss": math.nan})
    assert math.isnan(read_metrics(file)[0]["loss"])


def test_a_resumed_run_keeps_its_id_and_a_new_one_of_the_same_name_gets_another(
    tmp_path: Path,
) -> None:
    first = wandb_id(tmp_path / "one" / "wandb-id", anew=True)
    assert wandb_id(tmp_path / "one" / "wandb-id", anew=False) == first
    assert wandb_id(tmp_path / "two" / "wandb-id", anew=False) != first
    assert wandb_id(tmp_path / "one" / "wandb-id", anew=True) != first


def test_a_resume_that_fails_leaves_the_metrics_whole(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_steps(file, range(6))

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        MetricWriter(file, OFF, "tiny", 3)
    assert steps_in(file) == [0, 1, 2, 3, 4, 5]


def test_a_run_goes_on_where_weights_and_biases_lets_nobody_in(file: Path) -> None:
    code = (
        "import sys, pathlib, logging\n"
        "logging.basicConfig(format='%(message)s')\n"
        "from megadistill.config.schema import LogConfig\n"
        "from megadistill.metrics import MetricWriter\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "writer = MetricWriter(file, LogConfig(wandb='online', project='p'), 'tiny', 0)\n"
        "writer.write(1, {'branch': 'general', 'loss': 0.25})\n"
        "writer.close()\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"HOME": str(file.parent), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "Weights & Biases is left out from here on:" in done.stderr
    assert steps_in(file) == [1]


def test_offline_runs_are_recorded_for_a_later_upload(file: Path) -> None:
    """In a process of its own: wandb starts a service and hooks into the interpreter's exit."""
    code = (
        "import sys, pathlib\n"
        "from megadistill.config.schema import LogConfig\n"
        "from megadistill.metrics import MetricWriter\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "writer = MetricWriter(file, LogConfig(wandb='offline', project='p'), 'tiny', 0)\n"
        "writer.write(0, {'branch': 'start', 'loss': 0.5})\n"
        "writer.write(1, {'branch': 'general', 'loss': 0.25})\n"
        "writer.close()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_MODE"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (directory,) = (file.parent / "wandb").glob("offline-run-*")
    (record,) = directory.glob("run-*.wandb")
    run_id = (file.parent / "state" / "wandb-id").read_text()
    assert record.name == f"run-{run_id}.wandb"
    content = record.read_bytes()
    assert b"loss" in content
    assert b"general" in content
    assert steps_in(file) == [0, 1]
