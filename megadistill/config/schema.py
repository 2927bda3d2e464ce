"""The configuration tree: every setting a run has, with its default, its meaning and its unit."""

import datetime
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field

from megadistill.config.algorithm import AlgorithmConfig
from megadistill.config.cluster import ClusterConfig
from megadistill.config.fields import Config, Fraction, Name, NaturalInt, PositiveFloat, PositiveInt
from megadistill.config.refine import EngineConfig
from megadistill.config.rows import Location, RowConfig
from megadistill.config.work import WorkConfig

HeadBackend = Literal["auto", "torch", "triton"]
Precision = Literal["fp32", "bf16", "fp8_current", "fp8_blockwise"]


class ModelConfig(Config):
    """Where a model lies, and how it computes."""

    path: str
    """Hugging Face directory, hub name (`org/name`), or `cache:NAME` below the megadistill cache."""
    precision: Precision | None = None
    """Overrides the run's precision for this model, e.g. an FP8 teacher; absent: the run's."""


class ParallelConfig(Config):
    """Megatron-Core's parallel sizes; student and teachers share them."""

    tp: PositiveInt = 1
    """Tensor-parallel size."""
    pp: PositiveInt = 1
    """Pipeline-parallel size."""
    cp: PositiveInt = 1
    """Context-parallel size; above 1 a micro-batch holds one sequence."""
    dp: PositiveInt | None = None
    """Data-parallel size; absent: all trainer GPUs divided by tp x pp x cp (1 on a CPU)."""
    sequence_parallel: bool = False
    """Shard layer-norm activations over the tensor-parallel group; needs tp > 1."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Which activations are recomputed in backward instead of kept."""
    threads: PositiveInt = 1
    """CPU threads of one trainer process (only used without a GPU)."""

    def contradictions(self) -> Iterator[str]:
        if self.sequence_parallel and self.tp == 1:
            yield "sequence_parallel: found true with tp = 1, expected tp > 1"


class OptimizerConfig(Config):
    """Adam with decoupled weight decay; fp32 master weights and moments."""

    lr: PositiveFloat = 2e-6
    """Peak learning rate (CaMOPD A.7)."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Global gradient-norm clip; 0 switches it off."""
    warmup_steps: NaturalInt = 0
    """Steps of linear warm-up from 0 to lr."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the learning rate after warm-up; it would reach 0 one step after the last."""


class BatchConfig(Config):
    """How much one optimizer step sees, and how it is cut up."""

    size: PositiveInt = 512
    """Prompts (or SFT examples) in one optimizer step, over all data-parallel ranks."""
    responses: PositiveInt = 1
    """Responses to each prompt, all in one step; a step trains on so many times `size`. Not for SFT."""
    micro_batch_tokens: PositiveInt = 16384
    """Most tokens packed into one micro-batch; one longer sequence still fits alone."""


class RolloutConfig(EngineConfig):
    """vLLM engines that sample the student's responses."""

    engines: PositiveInt = 1
    """Number of engines; prompts are dealt to them in turn."""
    placement: Literal["dedicated", "split", "colocated"] = "dedicated"
    """Own nodes, own GPUs on the trainers' nodes, or the trainers' GPUs with sleep and wake."""
    max_tokens: PositiveInt = 32768
    """Cap on response tokens."""
    temperature: PositiveFloat = 1.0
    top_p: Fraction = 1.0
    top_k: NaturalInt = 0
    """0 switches top-k sampling off."""
    max_model_len: PositiveInt | None = None
    """Context length of the engine in tokens; absent: prompt cap + response cap."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """0: strictly on-policy; 1: the next batch is sampled while the trainer steps."""
    start_timeout_s: PositiveInt = 900
    """Seconds an engine may take to load before the run gives up."""
    timeout_s: PositiveInt = 3600
    """Seconds one batch of rollouts or one weight update may take."""


class SourceConfig(Config):
    """Where prompts come from."""

    @property
    def location(self) -> Location | None:
        """What is read, as `resolve` takes it; None for what is made."""
        return None


class PackagedSource(SourceConfig):
    """A set that ships with megadistill: authored medical questions or general prompts."""

    kind: Literal["packaged"] = "packaged"
    name: Literal["medical", "general"]

    @property
    def location(self) -> Location:
        name = {"medical": "medical_questions", "general": "general_prompts"}[self.name]
        return Location("data", f"packaged:{name}")


class ReasoningGymSource(SourceConfig):
    """Procedural reasoning tasks of the `reasoning-gym` package."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    tasks: list[str] = Field(default_factory=list)
    """Task names; empty: every task the package has."""
    size: PositiveInt = 1000
    """Number of prompts, divided evenly over the tasks."""
    seed: int = 0


class RowsSource(SourceConfig):
    """Which fields of a row hold what."""

    prompt: str = "prompt"
    """Field with the user's text, or with chat turns (`role` and `content`, or `from` and `value`)."""
    answer: str | None = None
    """Field with the reference answer; absent: the last turn of a chat, if the assistant's."""
    options: str | None = None
    """Field with answer options (a mapping letter -> text, a list, or lines `A. ...`)."""
    row: RowConfig | None = None
    """Reads rows as `megadistill prepare` does, instead of by `prompt`, `answer` and `options`."""
    where: dict[str, str] = Field(default_factory=dict)
    """Field -> text it must have: only such rows are read, so that one file whose rows name their teacher
    feeds a pool for each."""
    limit: PositiveInt | None = None
    """Use only the first `limit` of these records."""


class FileSource(RowsSource):
    """Prompts from a user's files: .jsonl, .json, .parquet or .csv, text also as .gz or .zst."""

    kind: Literal["file"] = "file"
    path: str
    """A file, a directory of files, or a glob pattern."""

    @property
    def location(self) -> Location:
        return Location("data", self.path)


class DatasetSource(RowsSource):
    """Prompts from a data set as the `datasets` library reads it."""

    kind: Literal["dataset"] = "dataset"
    path: str
    """`org/name` on the Hugging Face hub, a directory of data files, or one of `save_to_disk`."""
    subset: str | None = None
    """Which of its configurations, where it has several."""
    split: str = "train"
    """Name of a split, not a slice: `limit` takes the first rows."""
    revision: str | None = None
    """Branch, tag or commit on the hub; name a commit where runs shall be repeatable."""

    @property
    def location(self) -> Location:
        return Location("dataset", self.path, self.revision)

    def contradictions(self) -> Iterator[str]:
        if "[" in self.split or "+" in self.split:
            yield (
                f"split: found {self.split!r}, expected the name of one split; `limit` takes the "
                "first rows"
            )


Source = Annotated[
    PackagedSource | ReasoningGymSource | FileSource | DatasetSource, Field(discriminator="kind")
]


class PoolConfig(Config):
    """One pool of prompts and how its records become chat messages."""

    sources: list[Source]
    """Concatenated in this order."""
    template: Literal["plain", "medical"] = "plain"
    """`medical` wraps the question in CaMOPD's medical prompt (Fig. 7)."""


class DataConfig(Config):
    """All prompt pools, and what their prompts have in common."""

    pools: dict[str, PoolConfig]
    """Named prompt pools."""
    max_prompt_tokens: PositiveInt = 4096
    """Longer prompts lose their oldest turns; what still does not fit is dropped and counted."""
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of each pool, chosen by a hash of the id, that is never trained on."""
    enable_thinking: bool | None = None
    """Passed to the chat template where it knows the switch; absent: the template's default."""
    date: datetime.date | None = None
    """What chat templates take for today, `2026-11-29`; absent: the day on which the run began."""
    accept_changes: bool = False
    """Resume although files, tokenizer or chat template give other prompts than when the run began."""
    unusable: NaturalInt = 0
    """Records of a pool that may be left out, and are counted, because the chat template refuses them
    or the tokenizer can read a part of their text only as a control token; one more is an error."""


class HeldoutConfig(Config):
    """Full-vocabulary KL between the student and one teacher on held-out prompts."""

    pool: str
    teacher: str
    prompts: PositiveInt = 32
    """Number of held-out prompts."""
    max_tokens: PositiveInt = 64
    """Length of the teacher's sampled continuation on which the KL is measured."""


class AnswersConfig(Config):
    """Negative log-likelihood that the student gives the reference answers of held-out prompts."""

    pool: str
    """Its records must have answers."""
    prompts: PositiveInt = 32
    """Number of held-out prompts."""


class HeldoutEvalConfig(Config):
    """What is measured on held-out prompts, and when."""

    every: NaturalInt = 10
    """Steps between evaluations, also before the first and after the last; 0: never."""
    heldout: dict[str, HeldoutConfig] = Field(default_factory=dict)
    """Named held-out measurements."""
    answers: dict[str, AnswersConfig] = Field(default_factory=dict)
    """Further ones, with other names than those of `heldout`."""

    def contradictions(self) -> Iterator[str]:
        if twice := sorted(self.heldout.keys() & self.answers.keys()):
            yield f"answers: found {twice} in heldout, too, expected other names"


class CheckpointConfig(Config):
    """When the run is saved, and where the final student goes."""

    every: PositiveInt = 10
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """Whole checkpoints kept; older ones are deleted."""
    start_over: bool = False
    """Begin at step 0 when every checkpoint is damaged, instead of refusing."""
    export: bool = True
    """Write the final student in Hugging Face format."""
    export_dir: str | None = None
    """Where to (paths as in `student.path`); absent: `RUN/export`."""
    export_every: NaturalInt = 0
    """Steps between students that are written to `RUN/exports` while the run goes on; 0: none."""
    keep_exports: PositiveInt = 4
    """Of those, how many are kept; older ones are deleted, those first whose work is done."""
    on_export: WorkConfig | None = None
    """Work submitted as a Slurm array for every student in Hugging Face format that the run writes
    (`RUN/export`, `RUN/exports/step-*`); the run does not wait for it. `{export}` and `{step}` in
    its `args` stand for the directory and its step."""

    def contradictions(self) -> Iterator[str]:
        if self.export_every % self.every:
            yield (
                f"export_every: found {self.export_every}, expected a multiple of `every`, "
                f"{self.every}, so that a run that is resumed has the students it exported"
            )


class LogConfig(Config):
    """Where metrics go besides `metrics.jsonl` and the terminal."""

    wandb: Literal["off", "offline", "online"] = "offline"
    project: str = "megadistill"


class ChecksConfig(Config):
    """Limits of the start-up checks (ALGORITHMS: requirement 1 and section 4)."""

    max_mean_log_ratio: PositiveFloat = 0.02
    """Largest mean |log pi - log mu| on the first batch."""
    max_masked_fraction: Fraction = 0.005
    """Largest share of tokens masked by the importance bounds on the first batch."""


class RunConfig(Config):
    """One training run; `megadistill train` takes exactly this."""

    name: Name
    """Names the run directory and the Slurm job."""
    runs_dir: str = "runs"
    """The run directory is `runs_dir/name`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    steps: PositiveInt
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes GPUs where `cluster.gpus_per_node` > 0 and torch sees them."""
    precision: Precision = "bf16"
    """Compute precision; master weights and log-softmax are fp32 in every case."""
    head: HeadBackend = "auto"
    """What sweeps over the logits; `auto` is triton on a GPU where it is installed, else torch."""
    student: ModelConfig
    teachers: dict[str, ModelConfig] = Field(default_factory=dict)
    algorithm: AlgorithmConfig
    data: DataConfig
    batch: BatchConfig = Field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    rollout: RolloutConfig | None = None
    """Required but for sft, which has use for one only where `evaluate.heldout` needs it."""
    evaluate: HeldoutEvalConfig = Field(default_factory=HeldoutEvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    checks: ChecksConfig = Field(default_factory=ChecksConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    def contradictions(self) -> Iterator[str]:
        for key, name, known in self._references():
            if name not in known:
                yield f"{key}: found {name!r}, expected one of {sorted(known)}"
        algorithm = self.algorithm
        if algorithm.needs_rollouts and self.rollout is None:
            yield f"rollout: missing, {algorithm.kind} needs one"
        elif self.rollout is None and self.evaluate.heldout:
            yield "evaluate.heldout: needs rollout engines to sample the teachers' answers"
        elif not algorithm.needs_rollouts and self.rollout and not self.evaluate.heldout:
            yield f"rollout: found one, expected none for {algorithm.kind} without evaluate.heldout"
        if self.batch.responses > 1 and not algorithm.needs_rollouts:
            yield (
                f"batch.responses: found {self.batch.responses}, expected 1: {algorithm.kind} trains "
                "on the answers that come with the prompts"
            )
        if self.batch.size < algorithm.mixed_branches:
            yield (
                f"batch.size: found {self.batch.size}, expected at least {algorithm.mixed_branches}: "
                "every step mixes so many branches"
            )
        if self.optimizer.warmup_steps >= self.steps:
            yield (
                f"optimizer.warmup_steps: found {self.optimizer.warmup_steps}, expected less than "
                f"steps = {self.steps}"
            )
        if self.checkpoint.export_every > self.steps:
            yield (
                f"checkpoint.export_every: found {self.checkpoint.export_every}, expected at most "
                f"steps = {self.steps}, or nothing would be exported on the way"
            )

    def _references(self) -> Iterator[tuple[str, str, Mapping[str, object]]]:
        """Key, name found there, and what it may be the name of."""
        pools, teachers = self.data.pools, self.teachers
        for key, pool in self.algorithm.pools.items():
            yield f"algorithm.{key}", pool, pools
        for key, teacher in self.algorithm.teachers.items():
            yield f"algorithm.{key}", teacher, teachers
        for name, heldout in self.evaluate.heldout.items():
            yield f"evaluate.heldout.{name}.pool", heldout.pool, pools
            yield f"evaluate.heldout.{name}.teacher", heldout.teacher, teachers
        for name, answers in self.evaluate.answers.items():
            yield f"evaluate.answers.{name}.pool", answers.pool, pools
