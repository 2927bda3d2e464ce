"""The training loop with fake engines and real everything else: order, metrics, stop, resume, end."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from megadistill.algorithms import Mopd, make_algorithm
from megadistill.assemble import Parts
from megadistill.collect import OnPolicyCollector, Sampler
from megadistill.config.schema import OptimizerConfig
from megadistill.data.pools import PromptPool
from megadistill.evaluate.heldout import Heldout, teacher_texts
from megadistill.megatron.engine import Engine
from megadistill.metrics import MetricWriter, read_metrics
from megadistill.rundir import RunDir
from megadistill.state import RunState, restore, restore_ahead
from megadistill.train import learning_rate, train
from megadistill.types import FloatArray, Prompt, Rollout, Sample, StepResult, TokenSpan
from tests.fake_engines import FakeRolloutEngine, FakeTrainingEngine
from tests.tiny import (
    Tree,
    camopd_tree,
    float32,
    make_config,
    make_prompt,
    make_tokenizer,
    write_model_config,
)

pytestmark = pytest.mark.megatron  # the loop names the real engine's type


@dataclass
class FakeTrainer(FakeTrainingEngine):
    """An engine whose single weight follows the token weights that it is trained on."""

    rates: list[float] = field(default_factory=list)

    def step(self, samples: Sequence[Sample], loss: object, *, learning_rate: float) -> StepResult:
        self.rates.append(learning_rate)
        total = sum(float(sample.weights_R.sum()) for sample in samples)
        self.weights += learning_rate * total
        return StepResult(
            loss=total,
            grad_norm=2.0 if samples[0].span.token_ids_N[-1] % 2 else 0.5,
            learning_rate=learning_rate,
            num_tokens=sum(len(sample.span.token_ids_N) for sample in samples),
            metrics={"train/entropy_sum": 6.0, "train/rows": 4.0},
        )

    def score(self, model: str, spans: Sequence[TokenSpan]) -> list[FloatArray]:
        scores = super().score(model, spans)
        return [one + np.float32(self.weights) for one in scores] if model == "student" else scores

    def sketch(self, samples: Sequence[Sample], loss: object) -> FloatArray:
        """A direction that follows samples and weight, so that any cosine occurs."""
        total = sum(float(sample.weights_R.sum()) for sample in samples)
        angle = 9 * total * (1 + 50 * self.weights)
        return float32([np.cos(angle), np.sin(angle)])

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "model.weight", torch.tensor([self.weights], dtype=torch.float64)

    def memory_gib(self) -> float:
        return 1.5


class AgreeingEngine(FakeRolloutEngine):
    """Its log-probs are those of the trainer, so that nothing is masked."""

    def __init__(self, trainer: FakeTrainer) -> None:
        super().__init__()
        self.trainer = trainer
        self.weight = trainer.weights
        self.error = 0.0

    def generate(self, *arguments: Any, **options: Any) -> list[Rollout]:
        rollouts = super().generate(*arguments, **options)
        for rollout in rollouts:
            scores = self.weight - rollout.response_ids_R
            rollout.logprobs_R[:] = scores + self.error
        return rollouts

    def publish(self, version: int, files: Sequence[Path], checksum: str) -> None:
        super().publish(version, files, checksum)
        self.weight = self.trainer.weights


def make_pool(name: str) -> PromptPool:
    prompts = [make_prompt(f"{name}-{index}", pool=name) for index in range(10)]
    return PromptPool(name=name, train=prompts[2:], heldout=prompts[:2], num_dropped=0, seed=0)


POOLS = {name: make_pool(name) for name in ("general", "medical")}


@dataclass
class Stage:
    """One attempt at a run, with its fakes at hand."""

    parts: Parts
    state: RunState
    trainer: FakeTrainer
    engines: AgreeingEngine

    @property
    def run(self) -> RunDir:
        return self.parts.run

    def train(self) -> "Stage":
        train(self.parts, self.state)
        return self

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_metrics(self.run.metrics_file)


def attempt(folder: Path, **changes: Any) -> Stage:
    """Assemble a run in `folder` as `assemble` does, around fake engines."""
    teachers: Tree = {name: {"path": str(folder / name)} for name in ("general", "domain")}
    for name in teachers:
        (write_model_config(folder / name) / "model.safetensors").touch()
    heldout = {"all": {"pool": "medical", "teacher": "domain", "prompts": 2}}
    settings: Tree = {
        "runs_dir": str(folder / "runs"),
        "student": teachers["domain"],
        "teachers": teachers,
        "evaluate": {"every": 2, "heldout": heldout},
        "checkpoint": {"every": 2, "keep": 1},
        "optimizer": {"lr": 0.01, "warmup_steps": 1},
        "steps": 5,
    }
    config = make_config(camopd_tree(**settings | changes))
    run = RunDir.of(config)
    run.create(config)
    run.begin_attempt()
    trainer = FakeTrainer({"general": 0.5, "domain": 0.25})
    state = restore(run, trainer, config)
    engines = AgreeingEngine(trainer)
    engines.version = state.step
    assert config.rollout is not None
    look_ahead = config.rollout.max_staleness > 0
    sampler = Sampler(engines, seed=config.seed, num_steps=config.steps, look_ahead=look_ahead)
    sampler.version = state.step
    if ahead := restore_ahead(run, state):
        sampler.restore_pending(state.step, ahead)
    algorithm = make_algorithm(config, make_tokenizer([]), state.algorithm)
    assert isinstance(algorithm, Mopd)
    parts = Parts(run=run, config=config, engine=cast(Engine, trainer))
    parts.sampler = sampler
    parts.algorithm = algorithm
    parts.collector = OnPolicyCollector(algorithm, POOLS, trainer, sampler, state.cursors)
    parts.metrics = MetricWriter(run.metrics_file, config.log, config.name, state.step)

    def sample(teacher: str, prompts: Sequence[Prompt], max_tokens: int) -> list[Rollout]:
        return sampler.generate(prompts, [0] * len(prompts), max_tokens)

    file = run.path / "state" / "heldout.json"
    texts = teacher_texts(config.evaluate.heldout, POOLS, file, sample, trainer)
    parts.heldout = Heldout(texts=texts, teachers={"all": "domain"})
    return Stage(parts, state, trainer, engines)


def numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics without what depends on the clock."""
    return {
        key: value
        for key, value in row.items()
        if not key.startswith(("time/", "switch/")) and not key.endswith("per_s")
    }


def test_a_run_takes_all_steps_and_says_that_it_is_done(tmp_path: Path) -> None:
    stage = attempt(tmp_path).train()
    assert len(stage.trainer.rates) == 5
    progress = stage.run.read_progress()
    assert (progress["step"], progress["steps"], progress["done"]) == (5, 5, True)


def test_every_step_samples_from_the_weights_that_the_last_one_made(tmp_path: Path) -> None:
    stage = attempt(tmp_path).train()
    for step in range(5):
        rows = pq.read_table(stage.run.rollout_file(step + 1)).to_pylist()
        assert {row["policy_version"] for row in rows} == {step}
    assert [version for version, _, _ in stage.engines.published] == [1, 2, 3, 4, 5]
    _, files, _ = stage.engines.published[-1]
    assert float(load_file(files[0])["model.weight"]) == stage.trainer.weights


def test_metrics_begin_before_training_and_have_a_line_for_every_step(tmp_path: Path) -> None:
    rows = attempt(tmp_path).train().rows
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["branch"] for row in rows] == [
        "start", "general", "general", "general", "domain", "general",
    ]  # fmt: skip
    for row in rows[1:]:
        assert row["entropy"] == 1.5
        assert row["clipped"] == float(row["grad_norm"] > 1)
        assert row["memory/trainer_gib"] == 1.5
        assert {"time/step", "time/rollout", "time/score", "time/train", "time/publish"} <= set(row)
    assert {row["clipped"] for row in rows[1:]} == {0.0, 1.0}


def test_heldout_is_measured_first_last_and_between(tmp_path: Path) -> None:
    stage = attempt(tmp_path).train()
    measured = {row["step"]: row.get("heldout/all/forward_kl") for row in stage.rows}
    assert [step for step, value in measured.items() if value is not None] == [0, 2, 4, 5]
    assert measured[0] == 0.0
    assert measured[5] == pytest.approx(stage.trainer.weights)


def test_checkpoints_come_as_configured_and_at_the_end(tmp_path: Path) -> None:
    stage = attempt(tmp_path, checkpoint={"every": 2, "keep": 9}).train()
    assert [step for step, _ in stage.run.whole_checkpoints()] == [2, 4, 5]


def test_a_stop_request_saves_and_leaves_the_rest_for_later(tmp_path: Path) -> None:
    stage = attempt(tmp_path, checkpoint={"every": 100})
    stage.engines.before_generate = lambda: (
        stage.run.request_stop("time limit") if len(stage.rows) == 3 else None
    )
    stage.train()
    assert [step for step, _ in stage.run.whole_checkpoints()] == [3]
    assert not stage.run.read_progress()["done"]
    assert not stage.run.export.exists()


FAMILY: Tree = {
    "kind": "mopd",
    "branches": {
        "general": {"pool": "general", "teacher": "general"},
        "medical": {"pool": "medical", "teacher": "domain", "role": "preserve", "mass": 0.9},
    },
}
LEARNING: dict[str, Tree] = {
    "camopd": {},
    "velocity": {
        "algorithm": FAMILY | {"schedule": {"kind": "velocity", "every": 1, "first": 1}},
        "batch": {"size": 9},
    },
    "gap": {"algorithm": FAMILY | {"schedule": {"kind": "gap"}, "normalise": "share"}},
    "relaxed": {
        "algorithm": FAMILY
        | {"advantage": {"floor": 0.3}, "tokens": {"kind": "entropy", "explore": 0.6}}
    },
    "counteraction": {
        "algorithm": FAMILY | {"schedule": {"kind": "counteraction", "every": 1, "prompts": 3}}
    },
    "selectkd": {"algorithm": FAMILY | {"tokens": {"kind": "accepted", "rule": "sampled"}}},
}
"""What an algorithm may remember from step to step."""


@pytest.mark.parametrize("learns", LEARNING)
@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("stop_at", [1, 2, 4, 5])
def test_a_stopped_run_ends_as_if_it_had_not_stopped(
    tmp_path: Path, stop_at: int, max_staleness: int, learns: str
) -> None:
    stale: Tree = {"rollout": {"max_staleness": max_staleness}} | LEARNING[learns]
    whole = attempt(tmp_path / "whole", **stale).train()
    stopped = attempt(tmp_path / "stopped", **stale)
    stopped.engines.before_generate = lambda: (
        stopped.run.request_stop("asked") if len(stopped.rows) == stop_at else None
    )
    stopped.train()
    resumed = attempt(tmp_path / "stopped", **stale)
    assert resumed.state.step == stop_at
    resumed.train()
    assert [numbers(row) for row in resumed.rows] == [numbers(row) for row in whole.rows]
    assert resumed.trainer.weights == whole.trainer.weights
    assert resumed.run.read_progress()["done"]


def test_counteracting_branches_change_the_order_at_the_same_prompts(tmp_path: Path) -> None:
    """What is sampled aside is the same prompts with other seeds, and moves no cursor."""
    counteraction = LEARNING["counteraction"] | {"steps": 24}
    rows = attempt(tmp_path / "follows", **counteraction).train().rows[1:]
    order = [row["branch"] for row in rows]
    assert len({row["schedule/repeats"] for row in rows}) > 2
    assert order != (["general"] * 3 + ["medical"]) * 6
    for row in rows:
        cosine = row["schedule/cosine"]
        assert row["probe/general_medical_cosine"] == cosine
        assert np.sign(row["probe/general_medical_dot"]) == np.sign(cosine)
        assert row["time/probe"] > 0
    stage = attempt(tmp_path / "asked", **counteraction).train()
    aside = [prompts for prompts, _, limit in stage.engines.asked if len(prompts) == 6]
    assert len(aside) == 24
    assert all(prompts == aside[0] for prompts in aside)
    cursors = stage.parts.collector.cursors
    size = stage.parts.config.batch.size
    counts = {name: size * order.count(name) for name in ("general", "medical")}
    assert cursors == counts


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.mark.parametrize("learns", ["camopd", "counteraction"])
@pytest.mark.parametrize("kill_at", [1, 2, 3, 5])
def test_a_killed_run_repeats_what_it_had_not_saved(
    tmp_path: Path, kill_at: int, learns: str
) -> None:
    whole = attempt(tmp_path / "whole", **LEARNING[learns]).train()
    killed = attempt(tmp_path / "killed", **LEARNING[learns])

    def kill() -> None:
        if len(killed.rows) == kill_at:
            raise Killed

    killed.engines.before_generate = kill
    with pytest.raises(Killed):
        killed.train()
    resumed = attempt(tmp_path / "killed", **LEARNING[learns])
    assert resumed.state.step == (kill_at - 1) // 2 * 2
    resumed.train()
    assert [numbers(row) for row in resumed.rows] == [numbers(row) for row in whole.rows]


def test_the_final_student_is_exported_with_its_configuration(tmp_path: Path) -> None:
    stage = attempt(tmp_path).train()
    tensors = load_file(stage.run.export / "model.safetensors")
    assert float(tensors["model.weight"]) == stage.trainer.weights
    assert json.loads((stage.run.export / "config.json").read_text())["model_type"] == "llama"


def test_the_export_goes_where_the_configuration_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGADISTILL_CACHE", str(tmp_path / "cache"))
    stage = attempt(tmp_path, checkpoint={"export_dir": "cache:student"}).train()
    assert (tmp_path / "cache" / "student" / "model.safetensors").exists()
    assert not stage.run.export.exists()


def test_a_run_may_leave_out_the_export(tmp_path: Path) -> None:
    stage = attempt(tmp_path, checkpoint={"export": False}).train()
    assert stage.run.read_progress()["done"]
    assert not stage.run.export.exists()


def test_students_are_exported_while_the_run_goes_on(tmp_path: Path) -> None:
    seen: dict[int, float] = {}
    stage = attempt(tmp_path, checkpoint={"every": 1, "export_every": 2})

    def look() -> None:
        seen[len(stage.rows) - 1] = stage.trainer.weights

    stage.engines.before_generate = look
    stage.train()
    exports = {path.name: path for path in stage.run.exports.iterdir()}
    assert sorted(exports) == ["step-000002", "step-000004"]
    for step in (2, 4):
        tensors = load_file(exports[f"step-{step:06d}"] / "model.safetensors")
        assert float(tensors["model.weight"]) == seen[step]
    assert (exports["step-000002"] / "config.json").exists()


def test_an_export_that_a_kill_prevented_is_made_up_for(tmp_path: Path) -> None:
    kept = {"every": 2, "export_every": 2}
    killed = attempt(tmp_path, checkpoint=kept)

    def kill() -> None:
        if len(killed.rows) == 3:
            raise Killed

    killed.engines.before_generate = kill
    with pytest.raises(Killed):
        killed.train()
    shutil.rmtree(killed.run.step_export(2))
    resumed = attempt(tmp_path, checkpoint=kept)
    weight = resumed.trainer.weights
    resumed.train()
    tensors = load_file(resumed.run.step_export(2) / "model.safetensors")
    assert float(tensors["model.weight"]) == weight


def test_a_run_without_export_every_exports_nothing_before_its_end(tmp_path: Path) -> None:
    assert not attempt(tmp_path).train().run.exports.exists()


def test_a_finished_run_started_again_changes_nothing(tmp_path: Path) -> None:
    first = attempt(tmp_path).train()
    before = (first.run.export / "model.safetensors").stat().st_mtime_ns
    again = attempt(tmp_path).train()
    assert again.trainer.rates == []
    assert [numbers(row) for row in again.rows] == [numbers(row) for row in first.rows]
    assert (again.run.export / "model.safetensors").stat().st_mtime_ns == before


def test_a_rollout_engine_that_disagrees_ends_the_run_before_its_first_step(
    tmp_path: Path,
) -> None:
    stage = attempt(tmp_path)
    stage.engines.error = 0.5
    with pytest.raises(RuntimeError, match=r"log_ratio_absolute is 0\.5000"):
        stage.train()
    assert stage.trainer.rates == []
    assert stage.engines.published == []


def rates(num_steps: int, **settings: Any) -> list[float]:
    config = OptimizerConfig(lr=1.0, **settings)
    return [learning_rate(config, step, num_steps) for step in range(num_steps)]


def test_the_learning_rate_is_constant_by_default() -> None:
    assert rates(4) == [1.0] * 4


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert rates(6, warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_linear_decay_would_reach_zero_one_step_after_the_last() -> None:
    assert rates(4, decay="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_cosine_decay_is_half_way_in_the_middle() -> None:
    found = rates(8, decay="cosine")
    assert found[0] == 1.0
    assert found[4] == pytest.approx(0.5)
    assert found[2] == pytest.approx(0.5 * (1 + np.sqrt(0.5)))
    assert 0 < found[7] < 0.05


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay_begins_after_warm_up(decay: str) -> None:
    found = rates(10, warmup_steps=2, decay=decay)
    assert found[2] == max(found) == 1.0
    assert found == sorted(found[:3]) + sorted(found[3:], reverse=True)


def test_warm_up_longer_than_the_run_never_peaks() -> None:
    assert rates(2, warmup_steps=3, decay="cosine") == pytest.approx([0.25, 0.5])


def test_the_loop_applies_the_schedule(tmp_path: Path) -> None:
    stage = attempt(tmp_path).train()
    assert stage.trainer.rates == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.01])
    assert [row["learning_rate"] for row in stage.rows[1:]] == stage.trainer.rates
