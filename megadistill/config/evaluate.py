"""The configuration of `megadistill eval`: which systems answer which benchmarks, and who judges."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megadistill.config.fields import (
    Config,
    Fraction,
    Name,
    NaturalInt,
    PositiveInt,
    Temperature,
)
from megadistill.config.refine import ChatModelConfig, ServedConfig, StagedConfig
from megadistill.config.schema import DataConfig

Sandbox = Annotated[
    Literal["bubblewrap", "none"],
    BeforeValidator(lambda word: "bubblewrap" if word == "namespaces" else word),
]
"""`namespaces` is an older word for bubblewrap."""


class BenchmarkConfig(Config):
    """One benchmark; what is absent is as its protocol says."""

    path: str = "packaged"
    """Its items as .jsonl, .parquet or .csv; `packaged`: the file in a Python package that has it."""
    kind: str | None = None
    """Its protocol's name; absent: the key in `benchmarks`."""
    limit: PositiveInt | None = None
    """Use only the first items."""
    samples: PositiveInt | None = None
    """Answers to each item."""
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_k: NaturalInt | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    max_tokens: PositiveInt | None = None
    """Cap on the tokens of one answer."""
    judge: str | list[str] | None = None
    """Name in `models` of the model that judges or verifies; an odd number of them where each
    decides right or wrong (d_acc, ms_bench, gpqa_diamond, hmmt25), and the majority counts."""
    checkout: str | None = None
    """Directory with the benchmark's own code, for those that need it (livecodebench_v5, _v6)."""
    optional: bool = False
    """Leave it out, with a message, where its file is missing."""

    @property
    def judges(self) -> list[str]:
        """Those of `judge`."""
        if self.judge is None:
            return []
        return [self.judge] if isinstance(self.judge, str) else self.judge

    def contradictions(self) -> Iterator[str]:
        if isinstance(self.judge, list) and (
            len(self.judge) % 2 == 0 or len(set(self.judge)) < len(self.judge)
        ):
            yield f"judge: found {self.judge}, expected an odd number, each once"


class SignalConfig(Config):
    """A cheap signal: one number for each held-out text, from the training engine, in nats a token.

    Only of systems that the shards serve: those are directories that the engine can read.
    """

    kind: Literal["forward_kl", "reverse_kl", "nll"]
    """KL(teacher || system) or KL(system || teacher) over the vocabulary; -log p of the text."""
    pool: str
    """Pool of `data` whose held-out prompts begin the texts."""
    teacher: str | None = None
    """Name in `systems` or `models` of the one that wrote the texts, and whom a KL compares with;
    absent (`nll` only): the texts are the pool's own answers."""
    prompts: PositiveInt = 64
    """Most texts."""
    max_tokens: PositiveInt = 128
    """Cap on the tokens of a text; what is longer is cut."""

    def contradictions(self) -> Iterator[str]:
        if self.teacher is None and self.kind != "nll":
            yield f"teacher: missing, {self.kind} needs one"


class ExternalConfig(Config):
    """A benchmark that its own command runs, judgments included."""

    checkout: str
    """Directory with its code; each system works on a copy."""
    python: str
    """Interpreter that has what it needs."""
    max_tokens: PositiveInt = 32768
    """Cap on the tokens of one answer."""
    options: list[str] = Field(default_factory=list)
    """Further words for its command."""


class EvaluateConfig(StagedConfig):
    """One evaluation; `megadistill eval` takes exactly this."""

    systems: dict[Name, ChatModelConfig]
    """The models that answer, by the name they have in tables. `serve` runs vLLM in the shard;
    `extra_body.chat_template_kwargs.enable_thinking` sets their thinking mode."""
    benchmarks: dict[Name, BenchmarkConfig]
    signals: dict[Name, SignalConfig] = Field(default_factory=dict)
    """Held-out divergences and likelihoods, columns of the same tables."""
    data: DataConfig | None = None
    """Pools of `signals`; as in the runs that are compared, so that what is held out is the same."""
    recorded: dict[Name, dict[Name, str]] = Field(default_factory=dict)
    """System -> benchmark -> file of the benchmark's own evaluator: livebench (judgments),
    livecodebench_v5, livecodebench_v6 (*_eval_all.json); under any other name a log of inspect-ai
    (.eval or .json, `FILE#SCORER`) or of lm-eval (samples_*.jsonl, `FILE#METRIC`)."""
    external: dict[Literal["livebench"], ExternalConfig] = Field(default_factory=dict)
    """Benchmarks that their own commands run here. LiveBench's runs programs that models wrote
    outside of any sandbox, so it wants `sandbox: none`."""
    models: dict[str, ChatModelConfig] = Field(default_factory=dict)
    """Judges and verifiers, by name."""
    sandbox: Sandbox = "bubblewrap"
    """Where programs that models wrote run; `none`: with your rights, which is dangerous."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of the intervals; significance is marked at 1 - confidence."""
    most_holes: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest share of answers without a score (refused, failed, or with a verdict that cannot be read)
    at which a benchmark has a score; above, the table says why it has none."""
    baseline: str | None = None
    """System that the others are tested against; absent: the first."""

    def contradictions(self) -> Iterator[str]:
        for name, chosen in self.benchmarks.items():
            for judge in chosen.judges:
                if judge not in self.models:
                    known = sorted(self.models)
                    yield f"benchmarks.{name}.judge: found {judge!r}, expected one of {known}"
        for name in self.recorded:
            if name not in self.systems:
                yield f"recorded: found {name!r}, expected one of `systems`"
        if not self.systems or not (
            self.benchmarks or self.signals or self.external or self.recorded
        ):
            yield "systems and benchmarks: expected at least one of each"
        if self.external and self.sandbox != "none":
            yield "sandbox: found bubblewrap, but `external` runs programs without: none"
        yield from self._signal_problems()
        if self.baseline is not None and self.baseline not in self.systems:
            yield f"baseline: found {self.baseline!r}, expected one of `systems`"

    def _signal_problems(self) -> Iterator[str]:
        pools = sorted(self.data.pools) if self.data else []
        local = {
            name
            for name, model in {**self.models, **self.systems}.items()
            if isinstance(model, ServedConfig)
        }
        for name, signal in self.signals.items():
            if signal.pool not in pools:
                yield f"signals.{name}.pool: found {signal.pool!r}, expected one of {pools}"
            if signal.teacher is not None and signal.teacher not in local:
                found, known = signal.teacher, sorted(local)
                yield f"signals.{name}.teacher: found {found!r}, expected one of {known}"
            if name in self.benchmarks:
                yield f"signals.{name}: a benchmark has the same name"
