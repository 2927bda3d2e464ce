"""MOPD and CaMOPD: on-policy updates from any number of teachers, as a handful of decisions.

Vanilla MOPD mixes its branches in every step; CaMOPD alternates them, keeps the samples with the gap mass,
and scales recovery. Schedule, token rule, advantage, importance weight, loss and normaliser are set one
by one. Formulas: CaMOPD, arXiv:2605.27115. Shape legend: R response tokens.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self, TypeGuard

import numpy as np
from transformers import PreTrainedTokenizerBase

from megadistill import losses
from megadistill.algorithms.diagnostics import branch_metrics, token_means
from megadistill.algorithms.gaps import (
    advantage,
    importance_weights,
    mean_absolute_gap,
    mean_positive_gap,
    select_by_mass,
)
from megadistill.algorithms.protocol import (
    Loss,
    Measure,
    ScoringPlan,
    Selection,
    response_span,
)
from megadistill.algorithms.schedules import BranchSchedule, Counteraction, Reading, make_schedule
from megadistill.algorithms.tokens import token_weights
from megadistill.config.algorithm import CamopdConfig, DistillationConfig, MopdConfig
from megadistill.config.distillation import (
    AcceptedTokens,
    BranchConfig,
    EntropyAwareLoss,
    EntropyTokens,
    FullVocabularyLoss,
    JsdLoss,
    SampledLoss,
    TeacherEntropyTokens,
    Tokens,
    TopKLoss,
)
from megadistill.config.schema import RunConfig
from megadistill.types import (
    FloatArray,
    Rollout,
    Sample,
    Scored,
    ScoreRequest,
    StepResult,
    TokenSpan,
    TopK,
)

log = logging.getLogger(__name__)

STEPS = "_steps"
"""Key of the number of steps in the state; the name of no branch."""

SCORES: Mapping[str, Callable[[FloatArray], float]] = {
    "recover": mean_absolute_gap,  # Eq. (6): wherever the two models differ
    "preserve": mean_positive_gap,  # Eq. (7): only what the teacher prefers
}


@dataclass
class Mopd:
    """The decisions of `config`; every rank computes the same of the same rollouts."""

    config: DistillationConfig
    schedule: BranchSchedule
    seed: int
    num_steps: int
    steps_taken: int = 0
    selects: bool = True
    """Whether branches keep only the samples with their mass; else all."""
    _readings: dict[str, Reading] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig, state: Mapping[str, float]) -> Self:
        """The decisions of a run, with what `state` says that its schedule has learnt."""
        algorithm = config.algorithm
        assert isinstance(algorithm, MopdConfig | CamopdConfig)
        learnt = {key: value for key, value in state.items() if key != STEPS}
        return cls(
            config=algorithm,
            schedule=make_schedule(algorithm, config, learnt),
            seed=config.seed,
            num_steps=config.steps,
            steps_taken=int(state.get(STEPS, 0)),
        )

    @property
    def branches(self) -> Mapping[str, BranchConfig]:
        return self.config.all_branches()

    @property
    def scoring(self) -> ScoringPlan:
        """What token rule, advantage and loss need to know."""
        loss, tokens = self.config.loss, self.config.tokens
        temperature = getattr(loss, "temperature", 1.0)
        accepted = tokens.size if _is_greedy(tokens) else 0
        support = loss.size if isinstance(loss, TopKLoss | EntropyAwareLoss) else 0
        student = ScoreRequest(
            entropy=isinstance(tokens, EntropyTokens) and not self._explores,
            top_k=max(min(accepted, 1), loss.size if isinstance(loss, TopKLoss) else 0),
            temperature=temperature,
        )
        teacher = ScoreRequest(
            entropy=isinstance(tokens, TeacherEntropyTokens) or isinstance(loss, EntropyAwareLoss),
            top_k=max(accepted, support),
            temperature=temperature,
            hidden=isinstance(loss, FullVocabularyLoss | JsdLoss),
        )
        return ScoringPlan(
            student=student,
            teacher=teacher,
            at_student_ids=isinstance(loss, TopKLoss) and loss.side == "student",
            reference=self.config.advantage.reference,
            expected_gap=self.config.advantage.baseline,
        )

    def draws(self, step: int) -> Mapping[str, int]:
        """The active branches of a step: Eq. (5)."""
        return self.schedule.draws(step)

    def teacher_spans(self, rollouts: Sequence[Rollout]) -> list[TokenSpan]:
        """The same ids that the student wrote."""
        return [response_span(rollout) for rollout in rollouts]

    def select(self, scored: Sequence[Scored]) -> Selection:
        """Score, keep and weight the global batch; every rank computes the same result."""
        weighted: dict[int, ResponseWeights] = {}
        scores: dict[int, float] = {}
        metrics: dict[str, float] = {}
        self._readings = {}
        for branch, settings in self.branches.items():
            members = [index for index, item in enumerate(scored) if item.branch == branch]
            if not members:
                continue
            group = [scored[index] for index in members]
            branch_scores = [_score(branch, settings, item) for item in group]
            if not any(branch_scores):
                log.warning("branch %s: every score is 0, all samples are kept", branch)
            kept = sorted(self.keep(branch, branch_scores))
            weights = self._weights(group)
            for position in kept:
                weighted[members[position]] = replace(weights[position], num_kept=len(kept))
            scores |= dict(zip(members, branch_scores, strict=True))
            found = branch_metrics(
                group,
                branch_scores,
                len(kept),
                [own.importance_R for own in weights],
                [own.rule_R for own in weights],
            )
            self._readings[branch] = Reading(found["gap"], found["gap_absolute"])
            metrics |= {f"{branch}/{name}": value for name, value in found.items()}
        order = [
            i for branch in self.branches for i in sorted(weighted) if scored[i].branch == branch
        ]
        factors = self._factors(scored, weighted)
        metrics |= _token_shares(scored, weighted)
        samples = [self._sample(scored[i], weighted[i], factors[scored[i].branch]) for i in order]
        return Selection(samples=samples, selected=order, scores=scores, metrics=metrics)

    def keep(self, branch: str, scores: Sequence[float]) -> list[int]:
        """Eq. (8): the samples that hold rho_b of the branch's gap mass; without one all of them."""
        mass = self.branches[branch].mass if self.selects else None
        return list(range(len(scores))) if mass is None else select_by_mass(scores, mass)

    def loss(self, measure: Measure) -> Loss:
        """As `loss.kind` says."""
        loss = self.config.loss
        if isinstance(loss, SampledLoss):
            return losses.policy_gradient
        if isinstance(loss, EntropyAwareLoss):
            unsure = partial(losses.top_k, temperature=loss.temperature)
            return partial(losses.policy_gradient_and, divergence=unsure)
        if isinstance(loss, TopKLoss):
            return partial(
                losses.top_k,
                direction=loss.direction,
                tail=loss.tail,
                temperature=loss.temperature,
            )
        beta = loss.beta if isinstance(loss, JsdLoss) else 0.5
        return partial(
            losses.full_vocabulary,
            divergence=loss.kind,
            beta=beta,
            temperature=loss.temperature,
        )

    def observe(self, result: StepResult) -> dict[str, float]:
        """Let the schedule learn from the step, and name what the loss has summed."""
        learnt = self.schedule.observe(self.steps_taken, self._readings)
        self.steps_taken += 1
        return learnt | token_means(result.metrics)

    def state(self) -> dict[str, float]:
        """Steps taken, and what the schedule has learnt; `make` takes it back."""
        return {STEPS: self.steps_taken, **self.schedule.state()}

    def num_compared(self) -> int:
        """As the schedule counteraction says, every so many steps."""
        schedule = self.schedule
        if not isinstance(schedule, Counteraction) or self.steps_taken % schedule.config.every:
            return 0
        return schedule.config.prompts

    def compare(self, gradients: Mapping[str, FloatArray]) -> dict[str, float]:
        """Let the schedule learn from them."""
        assert isinstance(self.schedule, Counteraction)
        return self.schedule.learn(self.steps_taken, gradients)

    @property
    def _explores(self) -> bool:
        """Whether Relaxed OPD's phase I holds."""
        tokens = self.config.tokens
        part = tokens.explore if isinstance(tokens, EntropyTokens) else 0.0
        return self.steps_taken < part * self.num_steps

    def _weights(self, group: Sequence[Scored]) -> list["ResponseWeights"]:
        """Importance and token rule of every response of a branch."""
        config = self.config
        rule_R = token_weights(
            config.tokens,
            group,
            explores=self._explores,
            floor=config.advantage.floor,
            seed=self.seed + self.steps_taken,
        )
        shortens = isinstance(config.tokens, EntropyTokens) and config.tokens.shorten
        made = []
        for item, own_R in zip(group, rule_R, strict=True):
            mu_R = item.rollout.logprobs_R
            importance_R, counted_R = importance_weights(
                item.student_logprobs_R, mu_R, config.importance
            )
            counted = float((counted_R * own_R if shortens else counted_R).sum())
            made.append(ResponseWeights(importance_R=importance_R, rule_R=own_R, length=counted))
        return made

    def _factors(
        self, scored: Sequence[Scored], weighted: Mapping[int, "ResponseWeights"]
    ) -> dict[str, float]:
        """Branch -> factor on its loss: r_b, the schedule's, and of `normalise` what is the branch's."""
        lengths: dict[str, float] = {}
        prompts: dict[str, int] = {}
        for index, item in enumerate(scored):
            prompts[item.branch] = prompts.get(item.branch, 0) + 1
            if index in weighted:
                lengths[item.branch] = lengths.get(item.branch, 0.0) + weighted[index].length
        factors = {b: self.branches[b].scale * self.schedule.factor(b) for b in lengths}
        if self.config.normalise == "sequence":
            return factors
        total = sum(lengths.values())
        if self.config.normalise == "share":
            shares = {b: prompts[b] / len(scored) for b in lengths}
            balanced = share_factors(shares, lengths)
            factors = {branch: factors[branch] * balanced[branch] for branch in factors}
        return {branch: factor / total if total else 0.0 for branch, factor in factors.items()}

    def _sample(self, scored: Scored, weights: "ResponseWeights", factor: float) -> Sample:
        """Eq. (9) as per-token weights: (1/|S_b|) (1/T_i) w_t r_b A_t, all without gradient."""
        config, loss = self.config, self.config.loss
        scale = factor
        if config.normalise == "sequence":
            scale = factor / (weights.num_kept * weights.length) if weights.length else 0.0
        token_R = scale * weights.importance_R * weights.rule_R
        divergence_R = scale * weights.rule_R
        if getattr(loss, "importance", False):
            divergence_R = token_R
        if isinstance(loss, EntropyAwareLoss):
            assert scored.teacher.entropy_R is not None
            divergence_R = divergence_R * (scored.teacher.entropy_R > loss.above)
        shaped_R = advantage(
            scored.gap_R,
            config.advantage,
            reference_gap_R=_less(scored.reference_logprobs_R, scored.student_logprobs_R),
            expected_gap_R=scored.expected_gap_R,
        )
        samples = isinstance(loss, SampledLoss | EntropyAwareLoss)
        return Sample(
            span=response_span(scored.rollout),
            weights_R=(token_R * shaped_R if samples else 0 * token_R).astype(np.float32),
            divergence_weights_R=None
            if isinstance(loss, SampledLoss)
            else divergence_R.astype(np.float32),
            teacher=self.branches[scored.branch].teacher,
            hidden_RD=scored.teacher.hidden_RD,
            top_k=self._support(scored),
        )

    def _support(self, scored: Scored) -> TopK | None:
        """The ids that the loss compares both sides on, with the teacher's log-probabilities."""
        loss = self.config.loss
        if isinstance(loss, EntropyAwareLoss):
            return _first(scored.teacher.top_k, loss.size)
        if not isinstance(loss, TopKLoss):
            return None
        if loss.side == "teacher":
            return _first(scored.teacher.top_k, loss.size)
        student = _first(scored.student.top_k, loss.size)
        assert scored.teacher.at_ids_RK is not None
        return TopK(ids_RK=student.ids_RK, logprobs_RK=scored.teacher.at_ids_RK)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseWeights:
    """How much the tokens of one response count."""

    importance_R: FloatArray
    rule_R: FloatArray
    length: float
    """By which its sum is divided."""
    num_kept: int = 0
    """Responses that its branch keeps."""


def make(config: RunConfig, tokenizer: PreTrainedTokenizerBase, state: Mapping[str, float]) -> Mopd:
    """`mopd` and `camopd`, which differ in their configuration alone."""
    return Mopd.of(config, state)


def share_factors(shares: Mapping[str, float], lengths: Mapping[str, float]) -> dict[str, float]:
    """Factors that bring each branch's part of the loss tokens to its share (Open-MOPD, 2608.19098).

    The sum of all tokens stays what it was.
    """
    total = sum(lengths.values())
    return {
        name: shares[name] * total / length if length else 0.0 for name, length in lengths.items()
    }


def _score(branch: str, settings: BranchConfig, scored: Scored) -> float:
    """s_b of Eq. (6)-(7). Raises `FloatingPointError` where it is no number to select by."""
    score = SCORES[settings.role](scored.gap_R)
    if not math.isfinite(score):
        raise FloatingPointError(
            f"branch {branch}: found the score {score} of prompt {scored.rollout.prompt.id!r}, "
            "expected a finite number: student or teacher gave a token no finite log-probability"
        )
    return score


def _token_shares(
    scored: Sequence[Scored], weighted: Mapping[int, ResponseWeights]
) -> dict[str, float]:
    """Each branch's part of the tokens that are trained on."""
    tokens: dict[str, int] = {}
    for index in weighted:
        branch = scored[index].branch
        tokens[branch] = tokens.get(branch, 0) + len(scored[index].gap_R)
    total = sum(tokens.values())
    return {f"{branch}/token_share": count / total for branch, count in tokens.items()}


def _is_greedy(tokens: Tokens) -> TypeGuard[AcceptedTokens]:
    return isinstance(tokens, AcceptedTokens) and tokens.rule == "greedy"


def _first(top_k: TopK | None, size: int) -> TopK:
    """The first `size` of a model's most probable ids."""
    assert top_k is not None
    return TopK(ids_RK=top_k.ids_RK[:, :size], logprobs_RK=top_k.logprobs_RK[:, :size])


def _less(first_R: FloatArray | None, second_R: FloatArray) -> FloatArray | None:
    return None if first_R is None else first_R - second_R
