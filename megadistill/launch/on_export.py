"""Every student a run exports starts work of its own, which nobody waits for.

`checkpoint.on_export` says what. The node process sees a new export and starts
`python -m megadistill.launch.on_export RUN EXPORT` beside the run, which submits it: what goes wrong
there, or on the way to Slurm, is a line in RUN/logs/on_export.log and none of the run's business.
It also deletes old exports, so that `checkpoint.keep_exports` of them are left.
"""

import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from megadistill.config import resolve_path
from megadistill.config.work import WorkConfig
from megadistill.launch.commands import fill, limits_of, with_resources, work_shards
from megadistill.launch.shards import ShardFolder
from megadistill.launch.slurm import JOBS, live_jobs
from megadistill.launch.stages import ShardedStage, StageRecord
from megadistill.rundir import RunDir

LOOK_EVERY_S = 5.0


@dataclass(slots=True, kw_only=True)
class ExportWatch:
    """Starts the work for new exports and deletes old ones; never raises for what they cause."""

    run: RunDir
    work: WorkConfig | None
    final: Path
    """Where the last export goes."""
    keep: int
    """How many exports before the last are left."""
    _next: float = 0.0
    _children: "dict[Path, subprocess.Popen[bytes]]" = field(default_factory=dict)
    """Export -> the process that submits its work, or did."""

    def look(self, at_once: bool = False) -> None:
        """Start work for new exports and delete old ones, not more often than every few seconds."""
        if time.monotonic() < self._next and not at_once:
            return
        self._next = time.monotonic() + LOOK_EVERY_S
        try:
            for export in self.new_exports() if self.work is not None else []:
                self._children[export] = self.start(export)
            self.delete_old()
        except OSError as error:  # the run goes on whatever becomes of its evaluation
            note(self.run, f"could not look after exports: {error}")

    def new_exports(self) -> list[Path]:
        """Whole exports whose work was not begun in this attempt, nor submitted in an earlier one."""
        return [
            export
            for export in [*self.step_exports(), self.final]
            if export.is_dir()
            and export not in self._children
            and not (evaluation(self.run, export) / JOBS).exists()
        ]

    def step_exports(self) -> list[Path]:
        return sorted(self.run.exports.glob("step-*"))

    def delete_old(self) -> None:
        """Leave `keep` exports; of the others those go first whose work is done, then the oldest."""
        working = {export: self.is_at_work(export) for export in self.step_exports()}
        for export in sorted(working, key=lambda export: (working[export], export))[: -self.keep]:
            if working[export]:
                note(self.run, f"{export}: deleted before its work was done (keep_exports)")
            delete(export)

    def is_at_work(self, export: Path) -> bool:
        """Whether work on an export is still to be submitted, waits for its turn, or is under way."""
        if self.work is None:
            return False
        root = evaluation(self.run, export)
        if not (root / JOBS).exists():
            child = self._children.get(export)
            return child is None or child.poll() is None
        tries = self.work.tries
        return any(ShardFolder(path).has_work(tries) for path in (root / "shards").iterdir())

    def start(self, export: Path) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "megadistill.launch.on_export", str(self.run.path)]
        with log_file(self.run).open("ab") as log:
            return subprocess.Popen(
                [*command, str(export)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, timeout_s: float) -> None:
        """At the run's end: see the last export, and let the submissions get to Slurm."""
        self.look(at_once=True)
        deadline = time.monotonic() + timeout_s
        for export, child in self._children.items():
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                note(self.run, f"{export}: its submission was under way when the run ended")


def export_watch(run: RunDir) -> ExportWatch:
    """The watch of a run, as its configuration asks."""
    checkpoint = run.load_config().checkpoint
    final = run.export
    if checkpoint.export_dir is not None:
        final = Path(resolve_path(checkpoint.export_dir)).absolute()
    return ExportWatch(
        run=run, work=checkpoint.on_export, final=final, keep=checkpoint.keep_exports
    )


def delete(export: Path) -> None:
    """Under another name, so that nobody takes the rest of it for a whole one."""
    doomed = export.with_name(f".{export.name}.deleted")
    export.rename(doomed)
    for left in export.parent.glob(".*.deleted"):  # also what an earlier attempt could not finish
        shutil.rmtree(left)


def evaluation(run: RunDir, export: Path) -> Path:
    """Where the work on an export lies, as a stage."""
    return run.path / "evaluations" / (export.name if export.name.startswith("step-") else "final")


def read_evaluations(run: RunDir) -> list[str]:
    """How far the work is that exports have started, a line each, in the order of their steps."""
    every = list((run.path / "evaluations").glob("*"))
    work = run.look_at_config().checkpoint.on_export if every else None
    found = []
    for root in sorted(every, key=lambda path: (path.name == "final", path.name)):
        keys = tuple(path.name for path in (root / "shards").glob("*"))
        record = StageRecord(name=root.name, root=root, tries=work.tries if work else 1, keys=keys)
        found.append(f"{root.name}: shards done: {record.state({}).progress}")
    return found


def log_file(run: RunDir) -> Path:
    """Tells what became of every export."""
    return run.path / "logs" / "on_export.log"


def note(run: RunDir, text: str) -> None:
    """A line in the log of what became of the exports; a full disk is no reason to end the run."""
    try:
        with log_file(run).open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
    except OSError as error:
        sys.stderr.write(f"{text} ({error})\n")


def submit_work(run: RunDir, export: Path) -> list[str]:
    """Submit the run's `checkpoint.on_export` for one export; the arrays' numbers."""
    config = run.load_config()
    work = config.checkpoint.on_export
    assert work is not None
    step = str(step_of(run, export))
    marks = {"{export}": str(export), "{step}": step}
    filled = work.model_copy(update={"args": [fill(word, marks) for word in work.args]})
    config_file = Path(work.config or "")
    shards = work_shards(filled, label=f"step-{step}", config=config_file, depends=str(export))
    one_node = config.cluster.model_copy(update={"rollout_gpus_per_node": None})
    stage = ShardedStage(
        name=f"step-{step}",
        root=evaluation(run, export),
        shards=shards,
        limits=limits_of(work),
        cluster=with_resources(one_node, work),
        job_name=f"{config.name}-{step}",
    )
    return stage.submit(live_jobs())


def step_of(run: RunDir, export: Path) -> int:
    """The number of optimizer steps an export has seen."""
    if export.name.startswith("step-"):
        return int(export.name.removeprefix("step-"))
    return run.load_config().steps


def main() -> int:
    """`python -m megadistill.launch.on_export RUN EXPORT`, started by the node process."""
    run, export = RunDir(Path(sys.argv[1])), Path(sys.argv[2])
    if shutil.which("sbatch") is None:
        note(run, f"{export}: not submitted, found no sbatch here")
        return 0
    try:
        jobs = submit_work(run, export)
    except ValueError as error:
        note(run, f"{export}: could not be submitted: {error}")
        return 1
    except Exception:  # noqa: BLE001 - the end of this process; its log is where one looks
        note(run, f"{export}: could not be submitted\n{traceback.format_exc()}")
        return 1
    note(run, f"{export}: job {', '.join(jobs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
