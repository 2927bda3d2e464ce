"""The `algorithm` section: whom the student learns from, and how."""

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from megadistill.config.distillation import (
    AdvantageConfig,
    AllTokens,
    BranchConfig,
    EntropyTokens,
    ImportanceConfig,
    Loss,
    MixedSchedule,
    SampledLoss,
    Schedule,
    SharesSchedule,
    Tokens,
)
from megadistill.config.fields import Config, Fraction, Name, PositiveFloat, PositiveInt


class ScheduleConfig(Config):
    """CaMOPD Eq. (5): `general` steps of the general branch, then `domain` of the domain one."""

    general: PositiveInt = 3
    domain: PositiveInt = 1


class SelectiveBranchConfig(Config):
    """One of CaMOPD's two branches; its role is given by its name."""

    pool: str
    """Name of the prompt pool in `data.pools`."""
    teacher: str
    """Name of the teacher in `teachers`."""
    mass: Fraction = 0.8
    """rho_b of Eq. (8): the share of gap mass that the kept samples must hold."""
    scale: PositiveFloat = 1.0
    """r_b of Eq. (9): factor on the advantage."""


class BaseAlgorithmConfig(Config):
    """What a run asks of its algorithm, whichever it is."""

    decisions: ClassVar[str]
    """Module of `megadistill.algorithms` whose `make` carries the configuration out."""
    needs_rollouts: ClassVar[bool] = True
    """Whether it trains on the student's own responses."""
    branch_key: ClassVar[str] = "{}"
    """Where a branch of this name stands below `algorithm`."""

    def all_branches(self) -> Mapping[str, BranchConfig]:
        """Name in metrics -> pool, teacher and more of each branch."""
        return {}

    @property
    def pools(self) -> dict[str, str]:
        """Key below `algorithm` -> the prompt pool it names."""
        return {self.branch_key.format(n) + ".pool": b.pool for n, b in self.all_branches().items()}

    @property
    def teachers(self) -> dict[str, str]:
        """Key below `algorithm` -> the teacher it names."""
        branches = self.all_branches().items()
        return {self.branch_key.format(name) + ".teacher": b.teacher for name, b in branches}

    @property
    def mixed_branches(self) -> int:
        """Branches of which every step draws prompts."""
        return 1

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


class DistillationConfig(BaseAlgorithmConfig):
    """What MOPD and CaMOPD decide beside branches and schedule."""

    loss: Loss = Field(default_factory=SampledLoss)
    tokens: Tokens = Field(default_factory=AllTokens)
    """Which tokens of a response count, and how much."""
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig)
    importance: ImportanceConfig = Field(default_factory=ImportanceConfig)
    normalise: Literal["sequence", "token", "share"] = "sequence"
    """`sequence`: mean over a response's tokens, then over a branch's kept responses, branches summed
    (CaMOPD Eq. 2 and 3); `token`: mean over all kept tokens of the step; `share`: that, with each
    branch's part of the loss tokens brought to its part of the prompts (Open-MOPD)."""

    decisions = "mopd"

    @property
    def teachers(self) -> dict[str, str]:
        reference = self.advantage.reference
        named = {} if reference is None else {"advantage.reference": reference}
        return super().teachers | named

    def contradictions(self) -> Iterator[str]:
        advantage = self.advantage
        shaped = advantage.model_dump(exclude_defaults=True)
        if shaped and self.loss.kind not in ("sampled", "entropy_aware"):
            yield (
                f"advantage: found {', '.join(shaped)} with loss.kind {self.loss.kind}, expected "
                "nothing: a divergence of whole distributions has no advantage"
            )
        if isinstance(self.tokens, EntropyTokens) and self.tokens.explore and not advantage.floor:
            yield "tokens.explore: needs advantage.floor, from which a token counts"


class MopdConfig(DistillationConfig):
    """Multi-teacher on-policy distillation: any number of branches, by any schedule and loss.

    The defaults are vanilla MOPD, Eq. (2)-(3): every step mixes all branches, nothing is selected.
    """

    kind: Literal["mopd"] = "mopd"
    branches: dict[Name, BranchConfig] = Field(min_length=1)
    """Named branches: any number, and a teacher may serve several."""
    schedule: Schedule = Field(default_factory=MixedSchedule)

    branch_key = "branches.{}"

    @model_validator(mode="before")
    @classmethod
    def _two_branches(cls, tree: object) -> object:
        """The spelling of 0.1: `general`, `domain` and `general_share` instead of branches and shares."""
        roles = {"general": "recover", "domain": "preserve"}
        if not isinstance(tree, dict) or not tree.keys() & {*roles, "general_share"}:
            return tree
        tree = dict(tree)
        if "branches" in tree:
            old = next(key for key in (*roles, "general_share") if key in tree)
            raise ValueError(
                f"{old}: found it beside `branches`, expected one of the two spellings"
            )
        for name in roles.keys() & tree.keys():
            if not isinstance(tree[name], dict):
                raise ValueError(f"{name}: found {tree[name]!r}, expected a mapping of settings")
            if more := sorted(map(str, tree[name].keys() - {"pool", "teacher"})):
                raise ValueError(
                    f"{name}.{more[0]}: expected pool and teacher alone; a branch that selects or "
                    f"scales stands in `branches.{name}`"
                )
        share = tree.pop("general_share", 0.5)
        if type(share) not in (int, float) or not 0 < share <= 1:
            raise ValueError(
                f"general_share: found {share!r}, expected a number above 0, at most 1"
            )
        branches = {n: {"role": role, **tree.pop(n)} for n, role in roles.items() if n in tree}
        if share == 1.0:
            branches.pop("domain", None)
        shares = {"general": share, "domain": 1 - share} if len(branches) > 1 else None
        return {"branches": branches, "schedule": {"kind": "mixed", "shares": shares}} | tree

    def all_branches(self) -> Mapping[str, BranchConfig]:
        return self.branches

    @property
    def mixed_branches(self) -> int:
        return len(self.branches) if isinstance(self.schedule, SharesSchedule) else 1

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        drawn = self.schedule.branches(list(self.branches))
        if unknown := sorted(drawn - self.branches.keys()):
            yield f"schedule: found {unknown}, expected names of branches, {sorted(self.branches)}"
        if idle := sorted(self.branches.keys() - drawn):
            yield f"schedule: no step draws {idle}; expected every branch in it, or no such branch"
        roles = {branch.role for branch in self.branches.values()}
        if self.schedule.kind == "counteraction" and len(roles) == 1:
            yield (
                f"schedule: found counteraction with the role {roles.pop()} of every branch, expected "
                "at least one branch with role recover and one with preserve"
            )


class CamopdConfig(DistillationConfig):
    """CaMOPD, Eq. (5)-(9): two alternating branches, gap-mass selection, scaled recovery."""

    kind: Literal["camopd"] = "camopd"
    general: SelectiveBranchConfig
    domain: SelectiveBranchConfig
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)

    def all_branches(self) -> Mapping[str, BranchConfig]:
        return {
            "general": BranchConfig(role="recover", **dict(self.general)),
            "domain": BranchConfig(role="preserve", **dict(self.domain)),
        }


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

    def all_branches(self) -> Mapping[str, BranchConfig]:
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
