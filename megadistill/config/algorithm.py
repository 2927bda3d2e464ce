"""The `algorithm` section: whom the student learns from, and how."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megadistill.config.fields import STRICT, Fraction, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScheduleConfig:
    """CaMOPD Eq. (5): `general` steps of the general branch, then `domain` of the domain one."""

    general: PositiveInt = 3
    domain: PositiveInt = 1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BranchConfig:
    """One branch of MOPD: where its prompts come from, and who scores the answers."""

    pool: str
    """Name of the prompt pool in `data.pools`."""
    teacher: str
    """Name of the teacher in `teachers`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SelectiveBranchConfig(BranchConfig):
    """One branch of CaMOPD: also how much of its signal is used, and how strongly."""

    mass: Fraction = 0.8
    """rho_b of Eq. (8): the share of gap mass that the kept samples must hold; 1 keeps all."""
    scale: PositiveFloat = 1.0
    """r_b of Eq. (9): factor on the advantage."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImportanceConfig:
    """Bounds of the training/rollout probability ratio outside which a token is masked."""

    low: Annotated[float, Field(ge=0, lt=1)] = 0.5
    high: Annotated[float, Field(gt=1)] = 2.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SftConfig:
    """Supervised fine-tuning on the answers of one pool."""

    kind: Literal["sft"] = "sft"
    pool: str
    """Name of the pool in `data.pools`; its records must have answers."""
    max_tokens: PositiveInt = 8192
    """Longest prompt and answer together, at most what the context holds; records beyond are dropped
    and counted."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MopdConfig:
    """Vanilla MOPD, Eq. (2)-(3): every step mixes both branches, nothing is selected or scaled."""

    kind: Literal["mopd"] = "mopd"
    general: BranchConfig
    domain: BranchConfig
    general_share: Fraction = 0.5
    """Share of the batch drawn from the general branch."""
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CamopdConfig:
    """CaMOPD, Eq. (5)-(9): alternating branches, gap-mass selection, scaled recovery."""

    kind: Literal["camopd"] = "camopd"
    general: SelectiveBranchConfig
    domain: SelectiveBranchConfig
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RaftConfig:
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

    def __post_init__(self) -> None:
        if not self.sft and self.balance == "ema":
            raise ValueError("balance: found ema with sft: false, expected fixed: one loss alone")


AlgorithmConfig = Annotated[
    SftConfig | MopdConfig | CamopdConfig | RaftConfig, Field(discriminator="kind")
]
