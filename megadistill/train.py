"""The trainer: collect, step, publish, evaluate, log, save. The rest of the project serves this page.

Every trainer rank runs it in lockstep (`trainer.py` is the process).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megadistill import startup
from megadistill.algorithms.protocol import Comparing, Loss
from megadistill.assemble import Parts, publish_student
from megadistill.atomic import remove_torn
from megadistill.collect import Batch, OnPolicyCollector, timed
from megadistill.config import resolve_path
from megadistill.config.schema import OptimizerConfig
from megadistill.convert.hf_files import writing_model
from megadistill.report.rollouts import store_rollouts
from megadistill.resolve import resolve
from megadistill.state import RunState, save
from megadistill.types import Sample, StepResult


def train(parts: Parts, state: RunState) -> None:
    """The run, from where `state` stands to its end or to a stop request."""
    config = parts.config
    if state.step == 0:
        log_start(parts, evaluate(parts, 0))
    export_step(parts, state.step)  # a kill may have come between checkpoint and export
    for step in range(state.step, config.steps):
        times: dict[str, float] = {}
        with timed(times, "time/step"):
            batch = parts.collector.collect(step)
            if step == 0:
                startup.check_first_batch(batch.selection.metrics, config.checks)
            with timed(times, "time/train"):
                rate = learning_rate(config.optimizer, step, config.steps)
                result = take_step(parts, batch.selection.samples, rate)
            with timed(times, "time/publish"):
                publish_student(parts, version=step + 1)
        observed = parts.algorithm.observe(result)
        observed |= compare_gradients(parts, step + 1)
        state = state.after(step, parts.collector.cursors, parts.algorithm.state())
        memory = {"memory/trainer_gib": parts.engine.memory_gib()}
        measured = {**observed, **times, **memory, **evaluate(parts, state.step)}
        log_step(parts, state.step, batch, result, measured)
        stopping = parts.engine.broadcast(parts.run.stop_file.exists())
        if stopping or state.step % config.checkpoint.every == 0 or state.step == config.steps:
            ahead = parts.sampler.wait_pending() if parts.sampler else []
            save(parts.run, parts.engine, state, config.checkpoint.keep, ahead)
        if stopping:
            return
        export_step(parts, state.step)
    finish(parts)


def take_step(parts: Parts, samples: Sequence[Sample], rate: float) -> StepResult:
    """One optimizer step on the algorithm's loss of `samples`."""
    return parts.engine.step(samples, loss_of(parts, samples), learning_rate=rate)


def loss_of(parts: Parts, samples: Sequence[Sample]) -> Loss:
    """The algorithm's loss of these samples."""
    return parts.algorithm.loss(lambda loss: parts.engine.measure(samples, loss))


def compare_gradients(parts: Parts, steps_taken: int) -> dict[str, float]:
    """What the algorithm learns of its branches' gradients at these weights, where it asks for them."""
    algorithm, collector = parts.algorithm, parts.collector
    if not isinstance(algorithm, Comparing) or not (count := algorithm.num_compared()):
        return {}
    assert isinstance(collector, OnPolicyCollector)
    found: dict[str, float] = {}
    with timed(found, "time/probe"):
        batches = collector.compare(steps_taken, count)
        found |= algorithm.compare(
            {name: parts.engine.sketch(own, loss_of(parts, own)) for name, own in batches.items()}
        )
    return found


def evaluate(parts: Parts, steps_taken: int) -> dict[str, float]:
    """What is held out, measured where this number of steps calls for it."""
    every = parts.config.evaluate.every
    if not parts.heldout.texts or (steps_taken % every and steps_taken != parts.config.steps):
        return {}
    found: dict[str, float] = {}
    with timed(found, "time/evaluate"):
        found |= parts.heldout.measure(parts.engine)
    return found


def log_start(parts: Parts, measured: Mapping[str, float]) -> None:
    """The state before any training is line 0 of the metrics."""
    if parts.metrics is not None:
        parts.metrics.write(0, {"branch": "start", **measured})
        report_progress(parts, 0, "start")


def log_step(
    parts: Parts, steps_taken: int, batch: Batch, result: StepResult, extra: Mapping[str, float]
) -> None:
    """One line of metrics, the browsable rollouts, and the progress that `status` shows."""
    if parts.metrics is None:
        return
    clip = parts.config.optimizer.clip_grad
    values = {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "clipped": float(0 < clip < result.grad_norm),
        "learning_rate": result.learning_rate,
        "train/tokens": result.num_tokens,
        "train/tokens_per_s": result.num_tokens / extra["time/train"],
        **batch.metrics,
        **extra,
    }
    store_rollouts(parts.run.rollout_file(steps_taken), batch)
    parts.metrics.write(steps_taken, {"branch": batch.branch, **values})
    report_progress(parts, steps_taken, batch.branch)


def report_progress(parts: Parts, steps_taken: int, phase: str, done: bool = False) -> None:
    """What `megadistill status` and the launcher read."""
    steps = parts.config.steps
    parts.run.write_progress({"step": steps_taken, "steps": steps, "phase": phase, "done": done})


def finish(parts: Parts) -> None:
    """Write the student in Hugging Face format and say that the run is done. Collective."""
    checkpoint = parts.config.checkpoint
    if checkpoint.export:
        named = checkpoint.export_dir
        target = Path(resolve_path(named)) if named else parts.run.export
        export(parts, target)
    parts.engine.barrier()
    if parts.metrics is not None:
        parts.metrics.close()
        report_progress(parts, parts.config.steps, "done", done=True)


def export_step(parts: Parts, steps_taken: int) -> None:
    """Write the student of this step, where the configuration asks for it. Collective."""
    every = parts.config.checkpoint.export_every
    if every and steps_taken % every == 0 and 0 < steps_taken < parts.config.steps:
        export(parts, parts.run.step_export(steps_taken))


def export(parts: Parts, target: Path) -> None:
    """Stream the student to `target`, whole or absent; one that is there is this run's. Collective."""
    tensors = parts.engine.hf_tensors()
    if not parts.engine.is_writer or target.exists():
        for _ in tensors:
            pass  # every rank takes part to the end
        return
    remove_torn(target.parent, target.name)
    with writing_model(target) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)
        writer.copy_metadata(resolve("model", parts.config.student.path))


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Linear warm-up, then constant, or a cosine or linear decay towards 0 at the end."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.decay == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
    if config.decay == "linear":
        return config.lr * (1 - done)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))
