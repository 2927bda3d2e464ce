"""What an on-policy distillation decides: branches, their order, the loss, and which tokens count."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from megadistill.config.fields import Config, Fraction, PositiveFloat, PositiveInt

Probability = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class BranchConfig(Config):
    """Where prompts come from, and who scores the answers."""

    pool: str
    """Name of the prompt pool in `data.pools`."""
    teacher: str
    """Name of the teacher in `teachers`; several branches may share one."""
    role: Literal["recover", "preserve"] = "recover"
    """How samples are scored: `recover` by |gap|, wherever the models differ (CaMOPD Eq. 6), `preserve`
    by the gap where it is positive, what the teacher prefers (Eq. 7)."""
    mass: Fraction | None = None
    """rho_b of Eq. (8): the share of the branch's summed scores that the kept samples must hold;
    absent: all are kept."""
    scale: PositiveFloat = 1.0
    """r_b of Eq. (9): factor on the branch's loss."""


class CycleSchedule(Config):
    """One branch a step, in this order, over and over."""

    kind: Literal["cycle"] = "cycle"
    order: list[str] = Field(min_length=1)
    """Names of branches; a name may stand several times."""

    def branches(self, all_branches: Sequence[str]) -> set[str]:
        """Those that some step draws."""
        return set(self.order)


class SharesSchedule(Config):
    """Every step mixes branches."""

    shares: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Branch -> its part of the batch, in any unit; absent: equal parts."""

    def branches(self, all_branches: Sequence[str]) -> set[str]:
        """Those that some step draws."""
        shares = dict.fromkeys(all_branches, 1.0) if self.shares is None else self.shares
        return {name for name, share in shares.items() if share}

    def contradictions(self) -> Iterator[str]:
        if self.shares is not None and not any(self.shares.values()):
            yield f"shares: found {self.shares}, expected one above 0"


class MixedSchedule(SharesSchedule):
    """Every step mixes branches by fixed shares."""

    kind: Literal["mixed"] = "mixed"


class GapSchedule(SharesSchedule):
    """Fixed shares, and a branch's loss weighs more the larger its gap is (Open-MOPD)."""

    kind: Literal["gap"] = "gap"
    alpha: float = 1.0
    """The factor is (mean |gap| of the branch / mean over branches)^alpha; below 0 it would push the
    branches apart, which blew up in the authors' run."""
    low: PositiveFloat = 0.05
    high: PositiveFloat = 20.0
    """Bounds of the factor."""
    decay: Decay = 0.9
    """Of the moving average of a branch's mean |gap|."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.low > self.high:
            yield f"low: found {self.low}, expected at most high = {self.high}"


class VelocitySchedule(SharesSchedule):
    """Shares follow remaining gap x velocity (D3-MOPD, arXiv:2608.24987)."""

    kind: Literal["velocity"] = "velocity"
    every: PositiveInt = 10
    """Steps between new shares, also the window over which velocity is measured."""
    first: PositiveInt = 5
    """Observations of a branch whose mean its gap is divided by."""
    least_first: PositiveFloat = 0.15
    """Bound below that mean."""
    smoothing: PositiveInt = 10
    """Steps of the moving average of a branch's gap."""
    windows: PositiveInt = 3
    """Most windows that velocity is averaged over."""
    temperature: PositiveFloat = 0.5
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.10
    """Smallest share of a branch."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Shares of a step are varied at random by so much of themselves, at most."""


class CounteractionSchedule(Config):
    """Steps of the recovering branches, in turn, then one of every preserving branch, over and over.

    The more their gradients counteract, the more steps recover.
    """

    kind: Literal["counteraction"] = "counteraction"
    repeats: PositiveInt = 3
    """Recovering steps in a row where the gradients are orthogonal; repeats x (1 - cosine), rounded,
    elsewhere, 1 at least and twice `repeats` at most."""
    every: PositiveInt = 20
    """Steps between measurements of the cosine."""
    prompts: PositiveInt = 16
    """Prompts of each branch that it is measured on, always the same."""

    def branches(self, all_branches: Sequence[str]) -> set[str]:
        """Those that some step draws."""
        return set(all_branches)


Schedule = Annotated[
    CycleSchedule | MixedSchedule | GapSchedule | VelocitySchedule | CounteractionSchedule,
    Field(discriminator="kind"),
]


class SampledLoss(Config):
    """Policy gradient on the sampled tokens, CaMOPD Eq. (2) and (9)."""

    kind: Literal["sampled"] = "sampled"


class DivergenceLoss(Config):
    """A divergence of whole distributions at each token of the response."""

    temperature: PositiveFloat = 1.0
    """Of both distributions."""
    importance: bool = False
    """Whether a token's divergence is weighted by its importance weight, too."""


class FullVocabularyLoss(DivergenceLoss):
    """KL(teacher || student), as soft targets, or KL(student || teacher), over every id."""

    kind: Literal["forward_kl", "reverse_kl"]


class JsdLoss(DivergenceLoss):
    """GKD's generalised Jensen-Shannon divergence (arXiv:2306.13649) over every id."""

    kind: Literal["jsd"] = "jsd"
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """0 is the forward, 1 the reverse KL."""


class TopKLoss(DivergenceLoss):
    """KL on the K most probable ids of one side."""

    kind: Literal["top_k"] = "top_k"
    size: PositiveInt = 32
    side: Literal["teacher", "student"] = "teacher"
    """Whose most probable ids."""
    direction: Literal["forward", "reverse"] = "reverse"
    """KL(teacher || student), or KL(student || teacher)."""
    tail: bool = False
    """Count all other ids as one event, instead of renormalising on the K ids."""

    def contradictions(self) -> Iterator[str]:
        if self.size == 1 and not self.tail:
            yield (
                "size: found 1 without tail, expected at least 2, or tail: true: renormalised on one "
                "id both sides are certain of it, and nothing is learnt"
            )


class EntropyAwareLoss(DivergenceLoss):
    """Sampled tokens, and where the teacher is unsure forward KL on its top K (arXiv:2603.07079)."""

    kind: Literal["entropy_aware"] = "entropy_aware"
    size: PositiveInt = 16
    above: PositiveFloat = 0.8
    """Entropy of the teacher, in nats, from which it counts as unsure."""


Loss = Annotated[
    SampledLoss | FullVocabularyLoss | JsdLoss | TopKLoss | EntropyAwareLoss,
    Field(discriminator="kind"),
]


class AllTokens(Config):
    """Every token of the response."""

    kind: Literal["all"] = "all"


class EntropyTokens(Config):
    """Where the student is least sure (Relaxed OPD, arXiv:2603.11137)."""

    kind: Literal["entropy"] = "entropy"
    share: Probability = 0.2
    """Share of the branch's tokens, those of the largest entropy of the student."""
    explore: Annotated[float, Field(ge=0, le=1)] = 0.0
    """For this first part of the run: tokens whose gap is not below the floor of the advantage."""
    shorten: bool = False
    """Divide by the number of tokens that count, instead of by the length of the response."""


class AcceptedTokens(Config):
    """Where the teacher accepts what the student proposes (SelecTKD, arXiv:2510.24021)."""

    kind: Literal["accepted"] = "accepted"
    rule: Literal["greedy", "sampled"] = "greedy"
    """`greedy`: the student's most probable id is among the teacher's K; `sampled`: the token of the
    response passes with probability min(1, teacher / student)."""
    size: PositiveInt = 5
    """K of `greedy`."""
    weight: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Of tokens that are not accepted."""


class PrefixTokens(Config):
    """The first tokens only (Fast OPD, arXiv:2602.15260)."""

    kind: Literal["prefix"] = "prefix"
    tokens: PositiveInt = 2048


class TeacherEntropyTokens(Config):
    """Where the teacher's entropy is large."""

    kind: Literal["teacher_entropy"] = "teacher_entropy"
    above: PositiveFloat = 0.8
    """In nats."""


Tokens = Annotated[
    AllTokens | EntropyTokens | AcceptedTokens | PrefixTokens | TeacherEntropyTokens,
    Field(discriminator="kind"),
]


class AdvantageConfig(Config):
    """From the gap to the advantage of a token; only for losses on sampled tokens."""

    floor: Probability | None = None
    """lambda of Relaxed OPD: no advantage below log(lambda / (1 - lambda))."""
    reference: str | None = None
    """A teacher by name, pi_ref of G-OPD (arXiv:2602.12125): the advantage is
    scale x log(pi_T / pi_ref) - log(pi_student / pi_ref). Absent: scale x the gap."""
    scale: PositiveFloat = 1.0
    """lambda of G-OPD; above 1 it extrapolates beyond the teacher."""
    baseline: bool = False
    """Subtract the expected gap, -KL(student || teacher), of each token (vOPD, arXiv:2605.07865)."""


BOUNDS: Mapping[str, tuple[float, float]] = {
    "mask": (0.5, 2.0),
    "truncate": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "mis": (0.5, 2.0),
    "sequence": (0.999, 1.002),
    "none": (0.0, math.inf),
}
"""Kind of importance weight -> its default bounds (ALGORITHMS section 4)."""


class ImportanceConfig(Config):
    """Correction for rollouts whose engine samples a little differently than the trainer scores."""

    kind: Literal["mask", "truncate", "icepop", "mis", "sequence", "none"] = "mask"
    """What happens to a token whose probability ratio, trainer over rollout engine, leaves the bounds:
    `mask` and `icepop` drop it and leave the average's length, `mis` shortens that, too, `truncate`
    bounds the ratio, `sequence` drops the whole response by its geometric mean, `none` corrects
    nothing."""
    low: Annotated[float, Field(ge=0)] | None = None
    high: PositiveFloat | None = None
    """Bounds of the ratio; absent: 0.5 and 2, but for `icepop` 0.5 and 5, for `sequence` 0.999 and
    1.002; `truncate` has no lower one."""
    veto: Decay = 1e-4
    """`mis` drops a response with a token whose ratio is below."""

    @property
    def bounds(self) -> tuple[float, float]:
        """What holds."""
        low, high = BOUNDS[self.kind]
        return low if self.low is None else self.low, high if self.high is None else self.high

    def contradictions(self) -> Iterator[str]:
        low, high = self.bounds
        if self.kind != "none" and not low < 1 < high:
            yield f"low, high: found {low} and {high}, expected bounds around 1"
