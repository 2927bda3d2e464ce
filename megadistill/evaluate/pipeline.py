"""One evaluation from its configuration to a table: generate, score, sum up.

Both steps are fan-outs of shards, each named by a hash of all that its result depends on, so a
repeated call runs what is not done.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megadistill import stats
from megadistill.atomic import write_atomic
from megadistill.config import EvaluateConfig, dump, resolve_path
from megadistill.config.evaluate import ExternalConfig
from megadistill.config.refine import ChatModelConfig, ServedConfig
from megadistill.evaluate import (
    compare,
    entries,
    external,
    heldout_metrics,
    requirements,
    results,
)
from megadistill.evaluate.benchmarks import get_benchmark, recorded
from megadistill.evaluate.protocol import Benchmark, benchmark_file
from megadistill.evaluate.scoring import COLUMNS
from megadistill.inference.requests import SamplingParams
from megadistill.launch.shards import Shard, fingerprint
from megadistill.launch.staged_work import StagedWork
from megadistill.launch.stages import Limits, ShardedStage
from megadistill.refine.blocks import read_blocks, read_rows_of, write_rows
from megadistill.refine.entries import PlainArguments
from megadistill.refine.pipeline import identity
from megadistill.refine.stages import Stage

log = logging.getLogger(__name__)

FORMAT = 1
"""Changes when a shard computes something else from the same settings."""


@dataclass(slots=True)
class Evaluation:
    """One evaluation; `run` is the story."""

    config: EvaluateConfig
    gpu: bool

    @property
    def root(self) -> Path:
        return (Path(self.config.runs_dir) / self.config.name).absolute()

    def run(self) -> str:
        """Run what is not done, write the results, and return the table as Markdown."""
        self.config = requirements.without_missing(self.config)
        files = requirements.check(self.config)
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(self.root / "config.yaml", dump(self.config))
        answers = self.generate(files)
        scores = self.score(answers)
        measured = self.measure()
        judged = self.run_external()
        directories = self.write_results(scores, measured, judged)
        baseline = self.config.baseline or next(iter(self.config.systems))
        order = sorted(directories, key=lambda name: name != baseline)
        chosen = {name: [directories[name]] for name in order}
        return compare.write_tables(chosen, self.root / "report", self.config.confidence)

    def benchmark(self, name: str) -> Benchmark:
        return requirements.benchmark_of(self.config, name)

    def sampling(self, name: str) -> SamplingParams:
        """The protocol's settings with those that the configuration has."""
        chosen = self.config.benchmarks[name]
        names = ("samples", "temperature", "top_p", "top_k", "repetition_penalty", "max_tokens")
        set_here = {key: getattr(chosen, key) for key in names if getattr(chosen, key) is not None}
        return replace(self.benchmark(name).sampling, **set_here)

    def generate(self, files: Mapping[str, Path]) -> dict[tuple[str, str], list[str]]:
        """(system, benchmark) -> keys of the shards with the answers."""
        shards: dict[tuple[str, str], list[Shard[PlainArguments]]] = {}
        needs: dict[int, list[Shard[PlainArguments]]] = defaultdict(list)
        for system, model in self.config.systems.items():
            for name, chosen in self.config.benchmarks.items():
                common = {
                    "system": system,
                    "model": identity(model),
                    "benchmark": name,
                    "items": [fingerprint(files[name]), chosen.limit, chosen.kind or name],
                    "draw": asdict(self.sampling(name)),
                    "block": self.config.shards.block,
                    "seed": self.config.seed,
                    "of": self.config.shards.count,
                }
                gpus = _gpus(model)
                if self.benchmark(name).multi_turn is not None:
                    director = self.config.models[chosen.judges[0]]
                    common["director"] = identity(director)
                    gpus += _gpus(director)
                shards[system, name] = [
                    self.shard("generate", {**common, "part": part}, system, name)
                    for part in range(self.config.shards.count)
                ]
                needs[gpus] += shards[system, name]
        for gpus, group in needs.items():
            self.fan_out("generate", group, gpus)
        return {pair: [shard.key for shard in group] for pair, group in shards.items()}

    def score(self, answers: Mapping[tuple[str, str], Sequence[str]]) -> dict[tuple[str, str], str]:
        """(system, benchmark) -> key of the shard with the scores."""
        shards = {}
        needs: dict[int, list[Shard[PlainArguments]]] = defaultdict(list)
        for (system, name), keys in answers.items():
            judges = [self.config.models[judge] for judge in self.config.benchmarks[name].judges]
            arguments = {
                "benchmark": name,
                "answers": list(keys),
                "judges": [identity(judge) for judge in judges],
                **requirements.tools_identity(self.config, name),
                "block": self.config.shards.block,
            }
            shards[system, name] = self.shard("score", arguments, system, name)
            needs[sum(_gpus(judge) for judge in judges)].append(shards[system, name])
        for gpus, group in needs.items():
            self.fan_out("score", group, gpus)
        return {pair: shard.key for pair, shard in shards.items()}

    def measure(self) -> dict[tuple[str, str], Path]:
        """(system, signal) -> the file of its rows."""
        if not self.config.signals:
            return {}
        texts = {
            name: self.shard("write_texts", heldout_metrics.text_arguments(self.config, name), name)
            for name in self.config.signals
        }
        chosen = heldout_metrics.measured_systems(self.config)
        gpus = max(_gpus(model) for model in (*chosen.values(), *self.config.models.values()))
        self.fan_out("texts", list({shard.key: shard for shard in texts.values()}.values()), gpus)
        keys = {name: shard.key for name, shard in texts.items()}
        shards = {
            system: self.shard(
                "measure", heldout_metrics.measure_arguments(self.config, system, keys), system
            )
            for system in chosen
        }
        self.fan_out("measure", list(shards.values()), 1)
        stage = Stage(self.root / "stages" / "measure")
        return {
            (system, name): stage.outputs("measure", [shard.key])[0] / f"{name}.parquet"
            for system, shard in shards.items()
            for name in self.config.signals
        }

    def run_external(self) -> dict[str, dict[str, Path]]:
        """System -> benchmark -> what its own command left; what is recorded already, with it."""
        found = {
            system: {name: Path(resolve_path(file)) for name, file in files.items()}
            for system, files in self.config.recorded.items()
        }
        shards: dict[str, Shard[PlainArguments]] = {}
        for tool in self.config.external.values():
            for system, model in self.config.systems.items():
                arguments = external_arguments(system, model, tool)
                shards[system] = self.shard("run", arguments, system, "livebench")
        if shards:
            gpus = max(_gpus(model) for model in self.config.systems.values())
            self.fan_out("external", list(shards.values()), gpus)
        stage = Stage(self.root / "stages" / "external")
        for system, shard in shards.items():
            (folder,) = stage.outputs("external", [shard.key])
            found.setdefault(system, {})["livebench"] = folder / external.JUDGMENTS
        return found

    def write_results(
        self,
        scores: Mapping[tuple[str, str], str],
        measured: Mapping[tuple[str, str], Path],
        judged: Mapping[str, Mapping[str, Path]],
    ) -> dict[str, Path]:
        """System -> the directory of its results."""
        stage = Stage(self.root / "stages" / "score")
        directories = {}
        for system in self.config.systems:
            directory = directories[system] = self.root / "results" / system
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            summary = {}
            for name in self.config.benchmarks:
                rows = read_blocks(stage.outputs("score", [scores[system, name]]))
                write_rows(directory / f"{name}.parquet", rows, COLUMNS)
                summary[name] = self.described(
                    self.config.benchmarks[name].kind or name, self.sampling(name), rows
                ) | {"judges": self.config.benchmarks[name].judges}
            for name, file in judged.get(system, {}).items():
                found = recorded.read_recorded(name, file)
                write_rows(directory / f"{name}.parquet", found.rows, COLUMNS)
                described = self.described(found.kind, SamplingParams(), found.rows)
                summary[name] = {**described, **found.facts}
            for name, signal in self.config.signals.items():
                if (system, name) not in measured:
                    continue
                rows = read_rows_of(measured[system, name])
                write_rows(directory / f"{name}.parquet", rows, COLUMNS)
                title = {"title": heldout_metrics.title_of(signal)}
                summary[name] = self.described(signal.kind, SamplingParams(), rows) | title
            text = json.dumps(summary, indent=1)
            write_atomic(directory / results.SUMMARY, text)
        return directories

    def described(
        self, kind: str, sampling: SamplingParams, rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What is kept of a benchmark beside its transcripts (any: JSON)."""
        benchmark = get_benchmark(kind)
        found = results.summarise(rows, benchmark.groups)
        interval = stats.interval(
            found.values_I[None],
            found.weights_I,
            seed=self.config.seed,
            confidence=self.config.confidence,
            shares=benchmark.is_share,
        )
        return {
            "benchmark": kind,
            "title": benchmark.title,
            "draw": asdict(sampling),
            "whole_set": benchmark.size in (None, len(found.items)),
            "items": len(found.items),
            "answers": found.num_answers,
            "cut": found.num_cut,
            "score": asdict(interval),
            "details": dict(found.details),
        }

    def shard(self, entry: str, arguments: dict[str, Any], *label: str) -> Shard[PlainArguments]:
        return Shard(
            function=getattr(entries, entry),
            arguments=PlainArguments(values=arguments),
            label=" ".join((entry, *label)),
            version=FORMAT,
        )

    def fan_out(self, name: str, shards: Sequence[Shard[PlainArguments]], gpus: int) -> None:
        """Run a step's shards, those that are not done."""
        stage = Stage(self.root / "stages" / name)
        stage.write_runtime(self.runtime())
        chosen = self.config.shards
        limits = Limits(concurrency=chosen.concurrency, tries=chosen.tries)
        shards = [replace(shard, gpus=gpus if self.gpu else 0) for shard in shards]
        log.info("%s: %d shards", name, len(shards))
        sharded = ShardedStage(name=name, root=stage.path, shards=shards, limits=limits)
        StagedWork(
            name=self.config.name,
            root=self.root,
            command=(),
            stages=[sharded],
            limits=limits,
            cluster=self.config.cluster,
            finish=sharded.describe,
        ).carry_out(wait=True)
        sharded.check()

    def runtime(self) -> dict[str, Any]:
        """What shards need beside what their results depend on (any: JSON)."""
        adapter: TypeAdapter[dict[str, ChatModelConfig]] = TypeAdapter(dict[str, ChatModelConfig])
        return {
            "gpu": self.gpu,
            "sandbox": self.config.sandbox,
            "systems": adapter.dump_python(self.config.systems, mode="json"),
            "external": {
                name: {"checkout": str(Path(t.checkout).absolute()), "python": t.python}
                for name, t in self.config.external.items()
            },
            "models": adapter.dump_python(self.config.models, mode="json"),
            "benchmarks": {
                name: {
                    "kind": chosen.kind or name,
                    "path": str(benchmark_file(self.benchmark(name), chosen.path).absolute()),
                    "limit": chosen.limit,
                    "judges": chosen.judges,
                    "checkout": str(requirements.checkout_of(self.config, name) or ""),
                }
                for name, chosen in self.config.benchmarks.items()
            },
        }


def run_evaluation(config: EvaluateConfig) -> str:
    """Run an evaluation to its end; returns its table."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("megadistill").setLevel(logging.INFO)
    return Evaluation(config, uses_gpu(config)).run()


def uses_gpu(config: EvaluateConfig) -> bool:
    """Whether shards compute on GPUs."""
    if config.device != "auto":
        return config.device == "cuda"
    if config.cluster is not None:
        return config.cluster.gpus_per_node > 0
    import torch  # noqa: PLC0415 - slow to import

    return bool(torch.cuda.is_available())


def external_arguments(system: str, model: ChatModelConfig, tool: ExternalConfig) -> dict[str, Any]:
    """Of the shard in which a benchmark's own command asks a system (any: JSON)."""
    return {
        "system": system,
        "model": identity(model),
        "max_tokens": tool.max_tokens,
        "options": list(tool.options),
        "code": fingerprint(Path(tool.checkout) / external.COMMAND),
    }


def _gpus(model: ChatModelConfig) -> int:
    return model.engine.tp if isinstance(model, ServedConfig) else 0
