"""The state of a run between two steps: one object, saved and restored with the weights."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megadistill.config import RunConfig
from megadistill.data.manifest import file_bytes, hash_of
from megadistill.preflight import model_paths
from megadistill.resolve import resolve
from megadistill.rollout.store import read_rollouts, write_rollouts
from megadistill.rundir import RunDir, damaged_files, is_whole, step_of, was_whole
from megadistill.types import Rollout, TrainingEngine

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where a run stands between two steps."""

    step: int = 0
    """Optimizer steps taken; also the version of the weights."""
    cursors: Mapping[str, int] = field(default_factory=dict)
    """Prompts ever drawn from each pool."""
    algorithm: Mapping[str, float] = field(default_factory=dict)
    """What the algorithm has learnt about the run, e.g. moving averages of its losses."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Fingerprint of the student's start and of each teacher, by dotted key."""

    def after(
        self, step: int, cursors: Mapping[str, int], algorithm: Mapping[str, float]
    ) -> "RunState":
        """The state once `step` (from 0) has been taken."""
        return replace(self, step=step + 1, cursors=dict(cursors), algorithm=dict(algorithm))


AHEAD = "ahead.parquet"
"""In a checkpoint: rollouts of the next step, where they were sampled with older weights."""


def save(
    run: RunDir, engine: TrainingEngine, state: RunState, keep: int, ahead: Sequence[Rollout] = ()
) -> None:
    """Write a checkpoint that is whole or absent, then delete old ones. Collective.

    `ahead` are rank 0's rollouts that the next step will train on.
    """
    if not engine.is_writer:
        engine.barrier()
        engine.save(run.checkpoint(state.step), asdict(state))
        engine.barrier()
        return
    with run.writing_checkpoint(state.step) as directory:
        engine.barrier()
        engine.save(directory, asdict(state))
        if ahead:
            write_rollouts(directory / AHEAD, ahead)
        engine.barrier()
    run.drop_old_checkpoints(keep)


def restore(run: RunDir, engine: TrainingEngine, config: RunConfig) -> RunState:
    """Load the newest whole checkpoint, or start anew. Collective.

    Raises `ValueError` when a teacher or the starting student changed since the run began.
    """
    directory = engine.broadcast(_newest(run) if engine.is_writer else None)
    models = {key: fingerprint(path) for key, path in model_paths(config).items()}
    if directory is None:
        return RunState(models=models)
    state = RunState(**engine.load(directory))
    changed = [key for key, mark in models.items() if state.models.get(key) != mark]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: the files changed since {directory} was written; "
            "restore them, or start a new run under another `name`"
        )
    log.info("resuming after step %d from %s", state.step, directory)
    return state


def restore_ahead(run: RunDir, state: RunState) -> list[Rollout]:
    """The rollouts that were saved with `state`; none where it had none."""
    file = run.checkpoint(state.step) / AHEAD
    return read_rollouts(file) if file.exists() else []


def fingerprint(path: str) -> str:
    """A short mark of a model's files: names, sizes, and blocks spread over each.

    Raises `ValueError` when there is no such model, or it has no weights.
    """
    directory = resolve("model", path)
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{directory}: found no *.safetensors, expected a Hugging Face model")
    files = [*weights, *directory.glob("config.json")]
    return hash_of(part for file in files for part in file_bytes(file))


def _newest(run: RunDir) -> Path | None:
    """The newest checkpoint with nothing lost and nothing changed; says what is passed over.

    Raises `ValueError` when there is none left of those that were once whole: beginning anew would
    throw away what the run has done.
    """
    lost = []
    for directory in run.checkpoints():
        damaged = damaged_files(directory) if is_whole(directory) else ["not finished"]
        if not damaged:
            return directory
        problem = f"{directory} is torn or damaged"
        log.warning("%s and is passed over: %s", problem, ", ".join(damaged))
        if was_whole(directory) or run.read_progress().get("step", 0) > step_of(directory):
            lost.append(f"{problem}: {', '.join(damaged)}")
    if lost and not run.load_config().checkpoint.start_over:
        raise ValueError(
            "\n  ".join(["found no checkpoint to go on from:", *lost])
            + "\n  restore one of them, or begin at step 0 with checkpoint.start_over=true"
        )
    return None
