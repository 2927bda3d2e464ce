"""Stage 1 from its configuration to `refined.jsonl`: read, rewrite, filter, fuse, put together.

RUN/config.yaml               the resolved configuration
RUN/input/KEY/                records.parquet, rejected.json: the input, read once
RUN/stages/NAME/shards/KEY/   a shard of a stage; KEY hashes what its result depends on
RUN/refined.jsonl, refined.parquet, provenance.parquet, rejected.jsonl, summary.json
RUN/report/                   diagnostics

A shard's key hashes the keys of those it reads, too. So a repeated call runs what is not done, and a
changed setting runs its stage and those after it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from megadistill.config import RefineConfig
from megadistill.inference.model_argument import ModelArgument, gpus_of, model_hash
from megadistill.inference.staging import FORMAT, ShardMaker, begin, uses_gpu
from megadistill.inference.templates import load_template
from megadistill.launch.shards import KnownFile, Shard, content_hash, fingerprint
from megadistill.launch.stages import ShardedStage
from megadistill.refine import assembly, diagnosing, fusing, rewriting, similarity
from megadistill.refine.assembly import RefinedArguments
from megadistill.refine.blocks import part_of
from megadistill.refine.records import (
    PartArguments,
    input_files,
    read_records,
    read_settings,
    write_records,
)
from megadistill.resolve import resolve


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One refinement; `run` is the story."""

    config: RefineConfig
    gpu: bool

    def run(self, *, wait: bool = False) -> str:
        """Run or submit what is not done; returns what to say of it."""
        self.check()
        work = begin(self.config, "refine")
        records = self.read_input()
        rewrites = work.stage("rewrite", self.rewrites(records))
        measured = work.stage("filter", self.similarities(records, rewrites), needs=["rewrite"])
        fused = work.stage("fusion", self.fusions(records, rewrites, measured), needs=["filter"])
        refined = RefinedArguments(
            records=records,
            rewrites=rewrites.upstream(rewrites.shards),
            similarities=measured.upstream(measured.shards),
            fused=fused.upstream(fused.shards) if self.config.fusion else None,
            tau=self.config.filter.tau,
        )
        needs = ["fusion" if self.config.fusion else "filter"]
        report = work.stage("diagnose", self.diagnoses(refined), needs=needs)
        return work.carry_out(partial(self.finish, refined, work.stages, report), wait=wait)

    def check(self) -> None:
        """Complain of templates, encoder, input and GPUs before any work."""
        if (cluster := self.config.cluster) is not None and self.gpu:
            fusion = self.config.fusion
            used = {fusion.model, *fusion.judges} if fusion else set()
            served = sum(gpus_of(self.config.models[name]) for name in used)
            most = max(self.config.engine.tp, served)
            if most > cluster.gpus_per_node:
                raise ValueError(
                    f"cluster.gpus_per_node: found {cluster.gpus_per_node}, expected at least "
                    f"{most}, which the models of one shard use"
                )
        load_template(self.config.rewrite.template, rewriting.FIELDS)
        resolve("encoder", self.config.filter.encoder, key="filter.encoder")
        input_files(self.config.input)
        if (fusion := self.config.fusion) is not None:
            for path, names in (
                (fusion.template, fusing.FUSE_FIELDS),
                (fusion.judge_template, fusing.JUDGE_FIELDS),
            ):
                if load_template(path, names).has_opening:
                    raise ValueError(
                        f"{path}: found an assistant turn, which an endpoint cannot go on from"
                    )

    def read_input(self) -> KnownFile:
        """Read the input once."""
        contents = [fingerprint(file) for file in input_files(self.config.input)]
        key = content_hash([FORMAT, read_settings(self.config.input), *contents])
        file = self.config.root / "input" / key / "records.parquet"
        if not file.exists():
            records, rejected = read_records(self.config.input)
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            rows = [asdict(row) for row in rejected]
            assembly.write_json(file.with_name("rejected.json"), rows)
            write_records(file, records)
        return KnownFile(path=file, content=key)

    @property
    def shard(self) -> ShardMaker:
        return ShardMaker(gpu=self.gpu, threads=self.config.engine.threads)

    def parts(self, records: KnownFile, of: int) -> list[PartArguments]:
        """What the shards of a stage work on."""
        block = self.config.shards.block
        return [
            PartArguments(records=records, part=part, of=of, block=block, gpu=self.gpu)
            for part in range(of)
        ]

    def rewrites(self, records: KnownFile) -> list[Shard[Any]]:
        settings, engine = self.config.rewrite, self.config.engine
        template = load_template(settings.template, rewriting.FIELDS).hash
        model = model_hash(settings.model)
        shards = []
        for part in self.parts(records, self.config.shards.count):
            arguments = rewriting.RewriteArguments(
                **dict(part),
                settings=settings,
                template=template,
                model=model,
                date=self.config.date,
                seed=self.config.seed,
                engine=engine,
            )
            label = f"rewrite {part.part}"
            shards.append(self.shard(label, rewriting.rewrite, arguments, engine.tp))
        return shards

    def similarities(self, records: KnownFile, rewrites: ShardedStage) -> list[Shard[Any]]:
        settings = self.config.filter
        encoder = model_hash(settings.encoder, "encoder")
        shards = []
        for part, rewritten in zip(
            self.parts(records, len(rewrites.shards)), rewrites.shards, strict=True
        ):
            arguments = similarity.MeasureArguments(
                **dict(part),
                settings=settings.model_copy(update={"tau": 0.0, "batch_size": 1}),
                encoder=encoder,
                rewrites=rewrites.upstream([rewritten]),
                batch_size=settings.batch_size,
                threads=self.config.engine.threads,
            )
            shards.append(self.shard(f"filter {part.part}", similarity.measure, arguments, 1))
        return shards

    def fusions(
        self, records: KnownFile, rewrites: ShardedStage, measured: ShardedStage
    ) -> list[Shard[Any]]:
        settings = self.config.fusion
        if settings is None:
            return []
        models = {
            name: ModelArgument.of(name, self.config.models[name])
            for name in (settings.model, *settings.judges)
        }
        templates = (
            load_template(settings.template, fusing.FUSE_FIELDS).hash,
            load_template(settings.judge_template, fusing.JUDGE_FIELDS).hash,
        )
        of = min(self.config.shards.fusion, len(rewrites.shards))
        shards = []
        for part in self.parts(records, of):
            arguments = fusing.FuseArguments(
                **dict(part),
                settings=settings,
                templates=templates,
                models=models,
                rules=rewriting.rules_of(self.config.rewrite),
                tau=self.config.filter.tau,
                rewrites=rewrites.upstream(part_of(rewrites.shards, part.part, of)),
                similarities=measured.upstream(part_of(measured.shards, part.part, of)),
                seed=self.config.seed,
            )
            label = f"fusion {part.part}"
            shards.append(self.shard(label, fusing.fuse, arguments, arguments.gpus))
        return shards

    def diagnoses(self, refined: RefinedArguments) -> list[Shard[Any]]:
        if self.config.diagnose is None:
            return []
        arguments = diagnosing.DiagnoseArguments(
            **dict(refined),
            settings=self.config.diagnose,
            rewrite=self.config.rewrite,
            model=model_hash(self.config.rewrite.model),
            filter=self.config.filter,
            encoder=model_hash(self.config.filter.encoder, "encoder"),
            accept=self.config.fusion.accept if self.config.fusion else None,
            date=self.config.date,
            seed=self.config.seed,
            engine=self.config.engine,
            gpu=self.gpu,
        )
        return [self.shard("diagnose 0", diagnosing.diagnose, arguments, self.config.engine.tp)]

    def finish(
        self, refined: RefinedArguments, stages: Sequence[ShardedStage], report: ShardedStage
    ) -> str:
        """Write the results of the finished stages; returns the summary for people."""
        made = [stage for stage in stages if stage is not report]
        for stage in made:
            stage.check()
        result = assembly.assemble(refined, hashes_of(refined, made))
        root = self.config.root
        assembly.write_result(root, result)
        report.check()
        for output in report.outputs:
            assembly.copy_report(output, root / "report")
        summary = assembly.write_summary(root, self.config, result, stages)
        return assembly.describe(summary, root)


def hashes_of(refined: RefinedArguments, stages: Sequence[ShardedStage]) -> str:
    """By which input, models and templates the stages compute, as JSON."""
    found: dict[str, Any] = {"input": refined.records.content}
    for stage in stages:
        match stage.shards[0].arguments:
            case rewriting.RewriteArguments() as one:
                found[stage.name] = {"model": one.model, "template": one.template}
            case similarity.MeasureArguments() as one:
                found[stage.name] = {"encoder": one.encoder}
            case fusing.FuseArguments() as one:
                models = {name: model.identity for name, model in sorted(one.models.items())}
                found[stage.name] = {"models": models, "templates": one.templates}
    return json.dumps(found)


def run_refinement(config: RefineConfig, *, wait: bool = False) -> str:
    """Run or submit a refinement; returns what to say of it."""
    return Pipeline(config.begun(), uses_gpu(config)).run(wait=wait)
