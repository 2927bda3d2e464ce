"""One evaluation from its configuration to a table: generate, score, sum up.

Each stage is shards named by a hash of all that their results depend on, so a repeated call runs
what is not done.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megadistill.atomic import link_or_copy, write_atomic
from megadistill.config import EvaluateConfig, dump, resolve_path
from megadistill.evaluate import (
    compare,
    external,
    generating,
    heldout_metrics,
    requirements,
    results,
    scoring,
)
from megadistill.evaluate.benchmarks import get_benchmark, recorded
from megadistill.evaluate.protocol import Benchmark
from megadistill.inference.model_argument import ModelArgument, uses_gpu
from megadistill.inference.requests import SamplingParams
from megadistill.launch.shards import Arguments, KnownFile, Shard, Upstream
from megadistill.launch.staged_work import StagedWork
from megadistill.launch.stages import Limits
from megadistill.refine.blocks import FORMAT, Row, read_rows_of, write_rows

Pair = tuple[str, str]
"""A system, and a benchmark or a signal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation; `run` is the story."""

    config: EvaluateConfig
    gpu: bool
    systems: Mapping[str, ModelArgument]
    models: Mapping[str, ModelArgument]

    @classmethod
    def of(cls, config: EvaluateConfig, *, gpu: bool) -> "Evaluation":
        """Without the optional benchmarks whose files are not here."""
        config = requirements.without_missing(config)
        systems, models = (
            {name: ModelArgument.of(name, model) for name, model in some.items()}
            for some in (config.systems, config.models)
        )
        return cls(config=config, gpu=gpu, systems=systems, models=models)

    @property
    def root(self) -> Path:
        return (Path(self.config.runs_dir) / self.config.name).absolute()

    def run(self, *, wait: bool = False) -> str:
        """Run or submit what is not done; returns the table as Markdown, or how to follow the jobs."""
        files = requirements.check(self.config)
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(self.root / "config.yaml", dump(self.config))
        shards = self.config.shards
        work = StagedWork(
            name=self.config.name,
            root=self.root,
            command=("eval", "run", str(self.root / "config.yaml")),
            limits=Limits(concurrency=shards.concurrency, tries=shards.tries),
            cluster=self.config.cluster,
        )
        items = {name: KnownFile.of(file) for name, file in files.items()}
        scores = self.score(work, items, self.generate(work, items))
        measured = self.measure(work)
        judged = self.run_external(work)
        finish = partial(self.finish, work, scores | measured, judged)
        return work.carry_out(finish, wait=wait)

    def benchmark(self, name: str) -> Benchmark:
        return requirements.benchmark_of(self.config, name)

    def sampling(self, name: str) -> SamplingParams:
        """The protocol's settings with those that the configuration has."""
        chosen = self.config.benchmarks[name]
        names = ("samples", "temperature", "top_p", "top_k", "repetition_penalty", "max_tokens")
        set_here = {key: getattr(chosen, key) for key in names if getattr(chosen, key) is not None}
        return replace(self.benchmark(name).sampling, **set_here)

    def generate(self, work: StagedWork, items: Mapping[str, KnownFile]) -> dict[Pair, Upstream]:
        """The answers of each system to each benchmark."""
        shards: dict[Pair, list[Shard[Any]]] = {}
        for system, model in self.systems.items():
            for name, chosen in self.config.benchmarks.items():
                scenes = self.benchmark(name).multi_turn is not None
                director = self.models[chosen.judges[0]] if scenes else None
                first = generating.GenerateArguments(
                    benchmark=name,
                    kind=chosen.kind or name,
                    items=items[name],
                    limit=chosen.limit,
                    block=self.config.shards.block,
                    gpu=self.gpu,
                    system=system,
                    model=model,
                    director=director,
                    sampling=self.sampling(name),
                    seed=self.config.seed,
                    part=0,
                    of=self.config.shards.count,
                )
                gpus = model.gpus + (director.gpus if director else 0)
                shards[system, name] = [
                    self.shard(
                        *(generating.generate, first.model_copy(update={"part": part}), gpus),
                        label=f"generate {system} {name}",
                    )
                    for part in range(self.config.shards.count)
                ]
        stage = work.stage("generate", [shard for group in shards.values() for shard in group])
        return {pair: stage.upstream(group) for pair, group in shards.items()}

    def score(
        self, work: StagedWork, items: Mapping[str, KnownFile], answers: Mapping[Pair, Upstream]
    ) -> dict[Pair, Path]:
        """The file of the scores of each system at each benchmark."""
        shards = {}
        for (system, name), some in answers.items():
            chosen = self.config.benchmarks[name]
            arguments = scoring.ScoreArguments(
                benchmark=name,
                kind=chosen.kind or name,
                items=items[name],
                limit=chosen.limit,
                block=self.config.shards.block,
                gpu=self.gpu,
                answers=some,
                judges=tuple(self.models[judge] for judge in chosen.judges),
                checkout=requirements.checkout_of(self.config, name) or Path(),
                tools=requirements.tools_hash(self.config, name),
                sandbox=self.config.sandbox,
            )
            gpus = sum(judge.gpus for judge in arguments.judges)
            label = f"score {system} {name}"
            shards[system, name] = self.shard(scoring.score, arguments, gpus, label=label)
        stage = work.stage("score", list(shards.values()), needs=["generate"])
        return dict(zip(shards, [path / scoring.SCORES for path in stage.outputs], strict=True))

    def measure(self, work: StagedWork) -> dict[Pair, Path]:
        """The file of the values of each signal of each system."""
        if not self.config.signals:
            return {}
        known = {**self.models, **self.systems}
        texts = {}
        for name in self.config.signals:
            arguments = heldout_metrics.text_arguments(self.config, name, known, gpu=self.gpu)
            gpus, label = arguments.writer.gpus, f"texts {name}"
            texts[name] = self.shard(heldout_metrics.write_texts, arguments, gpus, label=label)
        written = work.stage("texts", list(texts.values()))
        upstream = {name: written.upstream([shard]) for name, shard in texts.items()}
        systems = heldout_metrics.measured_systems(self.config)
        shards = [
            self.shard(
                heldout_metrics.measure,
                heldout_metrics.measure_arguments(
                    self.config, system, upstream, known, gpu=self.gpu
                ),
                1,
                label=f"measure {system}",
            )
            for system in systems
        ]
        stage = work.stage("measure", shards, needs=["texts"])
        return {
            (system, name): output / f"{name}.parquet"
            for system, output in zip(systems, stage.outputs, strict=True)
            for name in self.config.signals
        }

    def run_external(self, work: StagedWork) -> dict[Pair, Path]:
        """What benchmarks' own commands leave, and what is recorded already."""
        found = {
            (system, name): Path(resolve_path(file))
            for system, files in self.config.recorded.items()
            for name, file in files.items()
        }
        shards = []
        for tool in self.config.external.values():
            for system, model in self.systems.items():
                arguments = external.ExternalArguments(
                    system=system,
                    model=model,
                    code=KnownFile.of(Path(tool.checkout) / external.COMMAND),
                    python=tool.python,
                    max_tokens=tool.max_tokens,
                    options=tuple(tool.options),
                    gpu=self.gpu,
                )
                label = f"external {system} livebench"
                shards.append(self.shard(external.run, arguments, model.gpus, label=label))
        stage = work.stage("external", shards)
        for system, output in zip(self.systems, stage.outputs, strict=False):
            found[system, "livebench"] = output / external.JUDGMENTS
        return found

    def shard(
        self,
        function: Callable[[Path, Arguments], None],
        arguments: Arguments,
        gpus: int,
        *,
        label: str,
    ) -> Shard[Any]:
        return Shard(
            function=function,
            arguments=arguments,
            label=label,
            gpus=gpus if self.gpu else 0,
            version=FORMAT,
        )

    def finish(
        self, work: StagedWork, made: Mapping[Pair, Path], judged: Mapping[Pair, Path]
    ) -> str:
        """Write the results of the finished stages; returns the table."""
        for stage in work.stages:
            stage.check()
        directories = self.write_results(made, judged)
        baseline = self.config.baseline or next(iter(self.config.systems))
        order = sorted(directories, key=lambda name: name != baseline)
        chosen = {name: [directories[name]] for name in order}
        return compare.write_tables(
            chosen, self.root / "report", self.config.confidence, self.config.most_holes
        )

    def write_results(
        self, made: Mapping[Pair, Path], judged: Mapping[Pair, Path]
    ) -> dict[str, Path]:
        """System -> the directory of its results; what shards made is not stored again."""
        directories = {}
        for system in self.config.systems:
            directory = directories[system] = self.root / "results" / system
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            summary = {}
            for name, chosen in self.config.benchmarks.items():
                rows = keep(made[system, name], directory / f"{name}.parquet")
                found = self.described(chosen.kind or name, self.sampling(name), rows)
                summary[name] = found | {"judges": chosen.judges}
            for (judged_system, name), file in judged.items():
                if judged_system == system:
                    left = recorded.read_recorded(name, file)
                    write_rows(directory / f"{name}.parquet", left.rows, scoring.COLUMNS)
                    found = self.described(left.kind, SamplingParams(), left.rows)
                    summary[name] = {**found, **left.facts}
            for name, signal in self.config.signals.items():
                if (system, name) in made:
                    rows = keep(made[system, name], directory / f"{name}.parquet")
                    found = self.described(signal.kind, SamplingParams(), rows)
                    summary[name] = found | {"title": heldout_metrics.title_of(signal)}
            write_atomic(directory / results.SUMMARY, json.dumps(summary, indent=1))
        return directories

    def described(self, kind: str, sampling: SamplingParams, rows: Sequence[Row]) -> dict[str, Any]:
        """What is kept of a benchmark beside its transcripts (any: JSON)."""
        benchmark = get_benchmark(kind)
        found = results.summarise(rows, benchmark.groups)
        estimated = results.estimate(
            [found],
            is_share=benchmark.is_share,
            confidence=self.config.confidence,
            most_holes=self.config.most_holes,
            seed=self.config.seed,
        )
        return {
            "benchmark": kind,
            "title": benchmark.title,
            "draw": asdict(sampling),
            "whole_set": benchmark.size in (None, len(found.items)),
            "items": len(found.items),
            "answers": found.num_answers,
            "holes": dict(found.holes),
            "cut": found.faults.get("cut", 0),
            "score": asdict(estimated.interval) if estimated.interval else None,
            "remark": estimated.remark,
            "details": dict(found.details),
        }


def keep(made: Path, place: Path) -> list[Row]:
    """Put the rows that a shard made among the results; returns them."""
    link_or_copy(made, place)
    return read_rows_of(place)


def run_evaluation(config: EvaluateConfig, *, wait: bool = False) -> str:
    """Run or submit an evaluation; returns its table, or how to follow the jobs."""
    return Evaluation.of(config, gpu=uses_gpu(config)).run(wait=wait)
