"""The `algorithm` section: whom the student learns from, and how."""

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megadistill.config.fields import Config, Fraction, PositiveFloat, PositiveInt


class ScheduleConfig(Config):
    """CaMOPD Eq. (5): `general` steps of the general branch, then `domain` of the domain one."""

    general: PositiveInt = 3
    domain: PositiveInt = 1


class BranchConfig(Config):
    """One branch of MOPD: where its prompts come from, and who scores the answers."""

    pool: str
    """Name of the prompt pool in `data.pools`."""
    teacher: str
    """Name of the teacher in `teachers`."""


class SelectiveBranchConfig(BranchConfig):
    """One branch of CaMOPD: also how much of its signal is used, and how strongly."""

    mass: Fraction = 0.8
    """rho_b of Eq. (8): the share of gap mass that the kept samples must hold; 1 keeps all."""
    scale: PositiveFloat = 1.0
    """r_b of Eq. (9): factor on the advantage."""


class ImportanceConfig(Config):
    """Bounds of the training/rollout probability ratio outside which a token is masked."""

    low: Annotated[float, Field(ge=0, lt=1)] = 0.5
    high: Annotated[float, Field(gt=1)] = 2.0


class BaseAlgorithmConfig(Config):
    """What a run asks of its algorithm, whichever it is."""

    decisions: ClassVar[str]
    """Module of `megadistill.algorithms` whose `make` carries the configuration out."""
    needs_rollouts: ClassVar[bool] = True
    """Whether it trains on the student's own responses."""

    @property
    def branches(self) -> Mapping[str, BranchConfig]:
        """Pool and teacher of each branch, by its name in metrics: its key, unless said otherwise."""
        return {key: value for key, value in self if isinstance(value, BranchConfig)}

    @property
    def pools(self) -> dict[str, str]:
        """Key below `algorithm` -> the prompt pool it names."""
        return {f"{name}.pool": branch.pool for name, branch in self.branches.items()}

    @property
    def teachers(self) -> dict[str, str]:
        """Key below `algorithm` -> the teacher it names."""
        return {f"{name}.teacher": branch.teacher for name, branch in self.branches.items()}

    @property
    def longest_answered(self) -> int | None:
        """Most tokens of a prompt with its answer; None where answers are not trained on."""
        return None

    @property
    def answers_in_context(self) -> int:
        """Answers, each as long as that at most, that a teacher reads before a response."""
        return 0


class SftConfig(BaseAlgorithmConfig):
    """Supervised fine-tuning on the answers of one pool."""

    kind: Literal["sft"] = "sft"
    pool: str
    """Name of the pool in `data.pools`; its records must have answers."""
    max_tokens: PositiveInt = 8192
    """Longest prompt and answer together, at most what the context holds; records beyond are dropped
    and counted."""

    decisions = "sft"
    needs_rollouts = False

    @property
    def pools(self) -> dict[str, str]:
        return {"pool": self.pool}

    @property
    def longest_answered(self) -> int:
        return self.max_tokens


class MopdConfig(BaseAlgorithmConfig):
    """Vanilla MOPD, Eq. (2)-(3): every step mixes both branches, nothing is selected or scaled."""

    kind: Literal["mopd"] = "mopd"
    general: BranchConfig
    domain: BranchConfig
    general_share: Fraction = 0.5
    """Share of the batch drawn from the general branch."""
    importance: ImportanceConfig = Field(default_factory=ImportanceConfig)

    decisions = "mopd"


class CamopdConfig(BaseAlgorithmConfig):
    """CaMOPD, Eq. (5)-(9): alternating branches, gap-mass selection, scaled recovery."""

    kind: Literal["camopd"] = "camopd"
    general: SelectiveBranchConfig
    domain: SelectiveBranchConfig
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    importance: ImportanceConfig = Field(default_factory=ImportanceConfig)

    decisions = "mopd"


class RaftConfig(BaseAlgorithmConfig):
    """RAFT, stage 2: SFT on refined answers plus answer-conditioned distillation, Eq. (6)-(12)."""

    kind: Literal["raft"] = "raft"
    pool: str
    """Name of the pool in `data.pools`; its records must have answers, the refined ones."""
    teacher: str
    """Name of the teacher in `teachers`: the original model, frozen."""
    max_tokens: PositiveInt = 8192
    """Longest prompt and answer together, at most what the context holds beside a response; records
    beyond are dropped and counted."""
    sft: bool = True
    """Whether the answers themselves are trained on, too."""
    context: Literal["answer", "none", "other"] = "answer"
    """What the teacher sees beside the question: its answer, nothing, or another one's (a probe)."""
    teacher_prompt_style: Literal["chat", "raw"] = "chat"
    """Whether the teacher's prompt goes through the chat template."""
    temperature: PositiveFloat = 1.5
    top_k: PositiveInt = 512
    """Ids of the teacher's distribution that both sides are renormalised on."""
    tail_bucket: bool = False
    """Instead of renormalising, count all other ids as one event, as SDPO does."""
    balance: Literal["ema", "fixed"] = "ema"
    """How lambda, the weight of the distillation loss, comes about."""
    weight: PositiveFloat = 1.0
    """lambda, where `balance` is fixed."""
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the moving averages of both losses."""
    lambda_mode: Literal["exact", "lagged"] = "lagged"
    """`exact` includes this step's losses, for one more forward pass."""
    lambda_max: PositiveFloat = 100.0
    """Bound on lambda, which grows without one as the distillation loss goes to 0."""

    decisions = "raft"

    @property
    def branches(self) -> Mapping[str, BranchConfig]:
        return {"domain": BranchConfig(pool=self.pool, teacher=self.teacher)}

    @property
    def pools(self) -> dict[str, str]:
        return {"pool": self.pool}

    @property
    def teachers(self) -> dict[str, str]:
        return {"teacher": self.teacher}

    @property
    def longest_answered(self) -> int:
        return self.max_tokens

    @property
    def answers_in_context(self) -> int:
        return {"none": 0, "answer": 1, "other": 2}[self.context]

    def contradictions(self) -> Iterator[str]:
        if not self.sft and self.balance == "ema":
            yield "balance: found ema with sft: false, expected fixed: one loss alone"


AlgorithmConfig = Annotated[
    SftConfig | MopdConfig | CamopdConfig | RaftConfig, Field(discriminator="kind")
]
