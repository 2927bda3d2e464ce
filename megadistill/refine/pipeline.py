"""Stage 1 from its configuration to `refined.jsonl`: read, rewrite, filter, fuse, put together.

Each stage is a fan-out of shards; a shard is named by a hash of all that its result depends on, the
names of the shards it reads among it. So a repeated call runs what is not done, and a changed
setting runs its stage and those after it.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from megadistill.atomic import write_atomic
from megadistill.config import RefineConfig, dump
from megadistill.config.refine import (
    ChatModelConfig,
    EndpointConfig,
    FilterConfig,
    FusionConfig,
    InputConfig,
    RewriteConfig,
    ServedConfig,
)
from megadistill.inference.templates import load_template
from megadistill.launch.shards import Shard, content_hash, fingerprint
from megadistill.launch.staged_work import StagedWork
from megadistill.launch.stages import Limits, ShardedStage
from megadistill.refine import assembly, entries, fusing, rewriting
from megadistill.refine.entries import PlainArguments
from megadistill.refine.records import input_files, read_records, read_settings, write_records
from megadistill.refine.stages import Stage, part_of
from megadistill.resolve import local, resolve

log = logging.getLogger(__name__)

FORMAT = 1
"""Changes when a stage computes something else from the same settings."""
HASHES = ("model", "template", "encoder", "models", "templates")
"""Arguments that say by which models and templates a stage computes."""
Arguments = dict[str, Any]  # plain JSON values


@dataclass(slots=True)
class Pipeline:
    """One refinement; `run` is the story."""

    config: RefineConfig
    gpu: bool
    stages: dict[str, Any] = field(default_factory=dict)
    """What each stage did, for the summary (any: JSON)."""
    hashes: dict[str, Any] = field(default_factory=dict)
    """Models and templates of each stage, for the provenance (any: JSON)."""

    @property
    def root(self) -> Path:
        return (Path(self.config.runs_dir) / self.config.name).absolute()

    def run(self) -> dict[str, Any]:
        """Run what is not done, write the results, and return the summary (any: JSON)."""
        self.check()
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(self.root / "config.yaml", dump(self.config))
        source = self.read_input()
        rewrites = self.rewrite(source)
        similarities = self.measure(source, rewrites)
        fused = self.fuse(source, rewrites, similarities)
        keys = {"rewrite": rewrites, "filter": similarities, "fusion": fused}
        result = assembly.assemble(
            self.root, self.config, source=source, keys=keys, hashes=self.hashes
        )
        assembly.write_result(self.root, result)
        if self.config.diagnose is not None:
            self.diagnose(source, result)
        return assembly.write_summary(self.root, self.config, result, self.stages)

    def check(self) -> None:
        """Complain of templates, encoder, input and GPUs before any work."""
        if (cluster := self.config.cluster) is not None and self.gpu:
            most = max(self.config.engine.tp, self.served_gpus())
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

    def read_input(self) -> str:
        """Read the input once; returns the key under which its records lie."""
        files = [fingerprint(file) for file in input_files(self.config.input)]
        settings = read_settings(self.config.input)
        key = content_hash([FORMAT, settings, *files])
        directory = self.root / "input" / key
        if not (directory / "records.parquet").exists():
            records, rejected = read_records(self.config.input)
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            assembly.write_json(directory / "rejected.json", [asdict(row) for row in rejected])
            write_records(directory / "records.parquet", records)
        return key

    def rewrite(self, source: str) -> list[str]:
        settings = self.config.rewrite
        common = {
            "settings": _dump(settings),
            "template": load_template(settings.template, rewriting.FIELDS).hash,
            "model": model_hash(settings.model),
            "input": source,
            "block": self.config.shards.block,
            "seed": self.config.seed,
        }
        parts = range(self.config.shards.count)
        arguments = [{**common, "part": part, "of": len(parts)} for part in parts]
        return self.fan_out("rewrite", "rewrite", arguments, gpus=self.config.engine.tp)

    def measure(self, source: str, rewrites: Sequence[str]) -> list[str]:
        settings = self.config.filter
        common = {
            # tau decides later, so another tau measures nothing again.
            "settings": {**_dump(settings), "tau": 0.0, "batch_size": 1},
            "encoder": model_hash(settings.encoder, "encoder"),
            "input": source,
            "block": self.config.shards.block,
        }
        arguments = [
            {**common, "rewrites": [key], "part": part, "of": len(rewrites)}
            for part, key in enumerate(rewrites)
        ]
        return self.fan_out("filter", "measure", arguments, gpus=1)

    def fuse(self, source: str, rewrites: Sequence[str], similarities: Sequence[str]) -> list[str]:
        settings = self.config.fusion
        if settings is None:
            return []
        names = sorted({settings.model, *settings.judges})
        common = {
            "settings": _dump(settings),
            "templates": [
                load_template(settings.template, fusing.FUSE_FIELDS).hash,
                load_template(settings.judge_template, fusing.JUDGE_FIELDS).hash,
            ],
            "models": {name: identity(self.config.models[name]) for name in names},
            "rules": asdict(rewriting.rules_of(self.config.rewrite)),
            "tau": self.config.filter.tau,
            "input": source,
            "block": self.config.shards.block,
            "seed": self.config.seed,
        }
        of = min(self.config.shards.fusion, len(rewrites))
        arguments = [
            {
                **common,
                "rewrites": list(part_of(rewrites, part, of)),
                "similarities": list(part_of(similarities, part, of)),
            }
            for part in range(of)
        ]
        return self.fan_out("fusion", "fuse", arguments, gpus=self.served_gpus())

    def served_gpus(self) -> int:
        """GPUs of the models that one shard of fusion serves."""
        if (fusion := self.config.fusion) is None:
            return 0
        models = [self.config.models[name] for name in {fusion.model, *fusion.judges}]
        return sum(model.engine.tp for model in models if isinstance(model, ServedConfig))

    def diagnose(self, source: str, result: assembly.Result) -> None:
        settings = self.config.diagnose
        assert settings is not None
        arguments = {
            "settings": _dump(settings),
            "model": model_hash(self.config.rewrite.model),
            "rewrite": _dump(self.config.rewrite),
            "filter": _dump(self.config.filter),
            "encoder": model_hash(self.config.filter.encoder, "encoder"),
            "accept": self.config.fusion.accept if self.config.fusion else None,
            "input": source,
            "result": result.key,
            "seed": self.config.seed,
        }
        (key,) = self.fan_out("diagnose", "diagnose", [arguments], gpus=self.config.engine.tp)
        (output,) = Stage(self.root / "stages" / "diagnose").outputs("diagnose", [key])
        assembly.copy_report(output, self.root / "report")

    def fan_out(
        self, name: str, entry: str, arguments: Sequence[Arguments], *, gpus: int
    ) -> list[str]:
        """Run a stage's shards, those that are not done, and return their keys in order."""
        stage = Stage(self.root / "stages" / name)
        stage.write_runtime(self.runtime())
        shards = [
            Shard(
                function=getattr(entries, entry),
                arguments=PlainArguments(values=values),
                label=f"{name} {number}",
                gpus=gpus if self.gpu else 0,
                version=FORMAT,
            )
            for number, values in enumerate(arguments)
        ]
        self.hashes[name] = {key: arguments[0][key] for key in HASHES if key in arguments[0]}
        folders = [stage.path / "shards" / shard.key for shard in shards]
        reused = sum((folder / "done.json").exists() for folder in folders)
        limits = Limits(concurrency=self.config.shards.concurrency, tries=self.config.shards.tries)
        begun = time.monotonic()
        log.info("%s: %d shards, %d of them done before", name, len(shards), reused)
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
        self.stages[name] = {
            "shards": len(shards),
            "reused": reused,
            "seconds": round(time.monotonic() - begun, 3),
            "keys": [shard.key for shard in shards],
        }
        return [shard.key for shard in shards]

    def runtime(self) -> dict[str, Any]:
        """What shards need and no result depends on (any: JSON)."""
        adapter: TypeAdapter[dict[str, ChatModelConfig]] = TypeAdapter(dict[str, ChatModelConfig])
        return {
            "gpu": self.gpu,
            "engine": _dump(self.config.engine),
            "batch_size": self.config.filter.batch_size,
            "models": adapter.dump_python(self.config.models, mode="json"),
        }


def run_refinement(config: RefineConfig) -> str:
    """Run a refinement to its end; returns its summary for people."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("megadistill").setLevel(logging.INFO)
    pipeline = Pipeline(config, uses_gpu(config))
    return assembly.describe(pipeline.run(), pipeline.root)


def uses_gpu(config: RefineConfig) -> bool:
    """Whether shards compute on GPUs."""
    if config.device != "auto":
        return config.device == "cuda"
    if config.cluster is not None:
        return config.cluster.gpus_per_node > 0
    import torch  # noqa: PLC0415 - slow to import

    return torch.cuda.is_available()


def model_hash(name: str, kind: Literal["model", "encoder"] = "model") -> str:
    """Identifies a model's files; a hub name stands for itself."""
    directory = local(kind, name)
    return name if directory is None else fingerprint(directory)


def identity(config: EndpointConfig | ServedConfig) -> Mapping[str, Any]:
    """What the answers of a model depend on (any: JSON), not where and how fast it runs."""
    if isinstance(config, EndpointConfig):
        return {"model": config.model, "extra_body": config.extra_body}
    return {
        "model": model_hash(config.path),
        "precision": config.precision,
        "context": config.max_model_len,
        "extra_body": config.extra_body,
        "options": config.options,
    }


def _dump(
    settings: InputConfig | RewriteConfig | FilterConfig | FusionConfig | Any,
) -> dict[str, Any]:  # any section: its plain JSON values
    values: dict[str, Any] = TypeAdapter(type(settings)).dump_python(settings, mode="json")
    return values
