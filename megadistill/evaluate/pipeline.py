"""One evaluation from its configuration to a table: generate, score, sum up.

Each stage is shards named by a hash of all that their results depend on, so a repeated call runs
what is not done.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megadistill.atomic import link_or_copy, write_atomic
from megadistill.config import EvaluateConfig, resolve_path
from megadistill.evaluate import (
    compare,
    external,
    generating,
    heldout_metrics,
    requirements,
    results,
    scoring,
)
from megadistill.evaluate.benchmarks import recorded
from megadistill.evaluate.generating import ItemsArguments
from megadistill.evaluate.protocol import Fields
from megadistill.inference.model_argument import ModelArgument
from megadistill.inference.requests import SamplingParams
from megadistill.inference.staging import ShardMaker, begin, uses_gpu
from megadistill.launch.shards import KnownFile, Shard, Upstream
from megadistill.launch.staged_work import StagedWork
from megadistill.refine.blocks import write_rows

Pair = tuple[str, str]
"""A system, and a benchmark or a signal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation; `run` is the story."""

    config: EvaluateConfig
    shard: ShardMaker
    systems: Mapping[str, ModelArgument]
    models: Mapping[str, ModelArgument]

    @classmethod
    def of(cls, config: EvaluateConfig, *, gpu: bool) -> "Evaluation":
        """Without the optional benchmarks whose files are not here."""
        config = requirements.without_missing(config).begun()
        systems, models = (
            {name: ModelArgument.of(name, model) for name, model in some.items()}
            for some in (config.systems, config.models)
        )
        return cls(config=config, shard=ShardMaker(gpu=gpu), systems=systems, models=models)

    def run(self, *, wait: bool = False) -> str:
        """Run or submit what is not done; returns the table as Markdown, or how to follow the jobs."""
        files = requirements.check(self.config)
        work = begin(self.config, "eval", "run")
        items = {name: self.items(name, file) for name, file in files.items()}
        scores = self.score(work, items, self.generate(work, items))
        measured = self.measure(work)
        judged = self.run_external(work)
        finish = partial(self.finish, work, scores | measured, judged)
        return work.carry_out(finish, wait=wait)

    @property
    def rules(self) -> results.Rules:
        return results.Rules(self.config.confidence, self.config.most_holes)

    def items(self, name: str, file: Path) -> ItemsArguments:
        chosen = self.config.benchmarks[name]
        return ItemsArguments(
            benchmark=name,
            kind=chosen.kind or name,
            items=KnownFile.of(file),
            limit=chosen.limit,
            block=self.config.shards.block,
            gpu=self.shard.gpu,
        )

    def sampling(self, name: str) -> SamplingParams:
        """The protocol's settings with those that the configuration has."""
        chosen = self.config.benchmarks[name]
        names = ("samples", "temperature", "top_p", "top_k", "repetition_penalty", "max_tokens")
        set_here = {key: getattr(chosen, key) for key in names if getattr(chosen, key) is not None}
        return replace(requirements.benchmark_of(self.config, name).sampling, **set_here)

    def generate(
        self, work: StagedWork, items: Mapping[str, ItemsArguments]
    ) -> dict[Pair, Upstream]:
        """The answers of each system to each benchmark."""
        shards: dict[Pair, list[Shard[Any]]] = {}
        for system, model in self.systems.items():
            for name, some in items.items():
                director = None
                if requirements.benchmark_of(self.config, name).multi_turn is not None:
                    director = self.models[self.config.benchmarks[name].judges[0]]
                first = generating.GenerateArguments(
                    **dict(some),
                    system=system,
                    model=model,
                    director=director,
                    sampling=self.sampling(name),
                    date=self.config.date,
                    seed=self.config.seed,
                    part=0,
                    of=self.config.shards.count,
                )
                label, gpus = f"generate {system} {name}", model.gpus
                gpus += director.gpus if director else 0
                parts = [first.model_copy(update={"part": part}) for part in range(first.of)]
                shards[system, name] = [
                    self.shard(label, generating.generate, part, gpus) for part in parts
                ]
        stage = work.stage("generate", [shard for group in shards.values() for shard in group])
        return {pair: stage.upstream(group) for pair, group in shards.items()}

    def score(
        self,
        work: StagedWork,
        items: Mapping[str, ItemsArguments],
        answers: Mapping[Pair, Upstream],
    ) -> dict[Pair, Path]:
        """The file of the scores of each system at each benchmark."""
        shards = {}
        for (system, name), some in answers.items():
            arguments = scoring.ScoreArguments(
                **dict(items[name]),
                answers=some,
                judges=tuple(self.models[one] for one in self.config.benchmarks[name].judges),
                checkout=requirements.checkout_of(self.config, name) or Path(),
                tools=requirements.tools_hash(self.config, name),
                sandbox=self.config.sandbox,
            )
            gpus = sum(judge.gpus for judge in arguments.judges)
            label = f"score {system} {name}"
            shards[system, name] = self.shard(label, scoring.score, arguments, gpus)
        stage = work.stage("score", list(shards.values()), needs=["generate"])
        return dict(zip(shards, [path / scoring.SCORES for path in stage.outputs], strict=True))

    def measure(self, work: StagedWork) -> dict[Pair, Path]:
        """The file of the values of each signal of each system."""
        if not self.config.signals:
            return {}
        known = {**self.models, **self.systems}
        texts = {}
        for name in self.config.signals:
            to_write = heldout_metrics.text_arguments(self.config, name, known, gpu=self.shard.gpu)
            label, gpus = f"texts {name}", to_write.writer.gpus
            texts[name] = self.shard(label, heldout_metrics.write_texts, to_write, gpus)
        written = work.stage("texts", list(texts.values()))
        upstream = {name: written.upstream([shard]) for name, shard in texts.items()}
        shards = {}
        for system in heldout_metrics.measured_systems(self.config):
            to_measure = heldout_metrics.measure_arguments(
                self.config, system, upstream, known, gpu=self.shard.gpu
            )
            label = f"measure {system}"
            shards[system] = self.shard(label, heldout_metrics.measure, to_measure, 1)
        stage = work.stage("measure", list(shards.values()), needs=["texts"])
        return {
            (system, name): output / f"{name}.parquet"
            for system, output in zip(shards, stage.outputs, strict=True)
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
                    gpu=self.shard.gpu,
                )
                label = f"external {system} livebench"
                shards.append(self.shard(label, external.run, arguments, model.gpus))
        stage = work.stage("external", shards)
        for system, output in zip(self.systems, stage.outputs, strict=False):
            found[system, "livebench"] = output / external.JUDGMENTS
        return found

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
        return compare.write_tables(chosen, self.config.root / "report", self.rules)

    def write_results(
        self, made: Mapping[Pair, Path], judged: Mapping[Pair, Path]
    ) -> dict[str, Path]:
        """System -> the directory of its results; what shards made is not stored again."""
        directories = {}
        for system in self.config.systems:
            directory = directories[system] = self.config.root / "results" / system
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            summary = {}
            for name, column in self.columns().items():
                if (system, name) in made:
                    link_or_copy(made[system, name], directory / f"{name}.parquet")
                    summary[name] = column
            for (judged_system, name), file in judged.items():
                if judged_system == system:
                    left = recorded.read_recorded(name, file)
                    write_rows(directory / f"{name}.parquet", left.rows, scoring.COLUMNS)
                    summary[name] = left.kind, left.facts
            described = {
                name: results.describe(directory / f"{name}.parquet", kind, self.rules)
                | dict(facts)
                for name, (kind, facts) in summary.items()
            }
            write_atomic(directory / results.SUMMARY, json.dumps(described, indent=1))
        return directories

    def columns(self) -> dict[str, tuple[str, Fields]]:
        """Of each benchmark and signal its kind, and what a summary says of it besides its results."""
        found: dict[str, tuple[str, Fields]] = {}
        for name, chosen in self.config.benchmarks.items():
            drawn = {"draw": asdict(self.sampling(name)), "judges": chosen.judges}
            found[name] = chosen.kind or name, drawn
        for name, signal in self.config.signals.items():
            found[name] = signal.kind, {"title": heldout_metrics.title_of(signal)}
        return found


def run_evaluation(config: EvaluateConfig, *, wait: bool = False) -> str:
    """Run or submit an evaluation; returns its table, or how to follow the jobs."""
    return Evaluation.of(config, gpu=uses_gpu(config)).run(wait=wait)
