"""MOPD and CaMOPD: one on-policy update that alternates between two teachers, or mixes them.

`Mopd` is the vanilla method. `Camopd` changes three of its decisions: which branch is active,
which samples are kept, and how strongly each branch pulls. Formulas: CaMOPD, arXiv:2605.27115.
Shape legend: R response tokens.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from megadistill.algorithms.gaps import (
    importance_weights,
    mean_absolute_gap,
    mean_positive_gap,
    select_by_mass,
)
from megadistill.algorithms.protocol import (
    Selection,
    TopKRequest,
    Weighted,
    response_span,
    rollout_metrics,
)
from megadistill.config.algorithm import (
    BranchConfig,
    CamopdConfig,
    ImportanceConfig,
    MopdConfig,
    SelectiveBranchConfig,
)
from megadistill.config.schema import RunConfig
from megadistill.types import FloatArray, Rollout, Sample, Scored, TokenSpan

log = logging.getLogger(__name__)

SCORES: Mapping[str, Callable[[FloatArray], float]] = {
    "general": mean_absolute_gap,  # Eq. (6): recover wherever the two models differ
    "domain": mean_positive_gap,  # Eq. (7): preserve only what the domain teacher prefers
}


@dataclass(frozen=True)
class Mopd(Weighted):
    """Vanilla MOPD, Eq. (2)-(3): the sum of both branches' losses, over all their samples."""

    branches: Mapping[str, BranchConfig]
    importance: ImportanceConfig
    period: tuple[Mapping[str, int], ...]
    """Branch -> number of prompts, of each step until the schedule repeats."""
    top_k: TopKRequest | None = None

    def draws(self, step: int) -> Mapping[str, int]:
        """The active branches of a step: Eq. (5)."""
        return self.period[step % len(self.period)]

    def keep(self, branch: str, scores: Sequence[float]) -> list[int]:
        """Everything."""
        return list(range(len(scores)))

    def scale(self, branch: str) -> float:
        """r_b = 1."""
        return 1.0

    def teacher_spans(self, rollouts: Sequence[Rollout]) -> list[TokenSpan]:
        """The same ids that the student wrote."""
        return [response_span(rollout) for rollout in rollouts]

    def select(self, scored: Sequence[Scored]) -> Selection:
        """Score, keep and weight the global batch; every rank computes the same result."""
        samples: list[Sample] = []
        selected: list[int] = []
        scores: dict[int, float] = {}
        metrics: dict[str, float] = {}
        for branch in self.branches:
            members = [index for index, item in enumerate(scored) if item.branch == branch]
            if not members:
                continue
            branch_scores = [_score(branch, scored[index]) for index in members]
            if not any(branch_scores):
                log.warning("branch %s: every score is 0, all samples are kept", branch)
            kept = sorted(members[position] for position in self.keep(branch, branch_scores))
            scores.update(zip(members, branch_scores, strict=True))
            samples += [self._sample(scored[index], len(kept)) for index in kept]
            selected += kept
            group = [scored[index] for index in members]
            metrics |= self._metrics(branch, group, branch_scores, len(kept))
        return Selection(samples=samples, selected=selected, scores=scores, metrics=metrics)

    def _sample(self, scored: Scored, num_kept: int) -> Sample:
        """Eq. (9) as per-token weights: (1/|S_b|) (1/T_i) w_t r_b A_t, all without gradient."""
        gap_R = scored.gap_R
        scale = self.scale(scored.branch) / (num_kept * len(gap_R))
        return Sample(
            span=response_span(scored.rollout),
            weights_R=(scale * self._importance(scored) * gap_R).astype(np.float32),
        )

    def _importance(self, scored: Scored) -> FloatArray:
        bounds = self.importance
        mu_R = scored.rollout.logprobs_R
        return importance_weights(scored.student_logprobs_R, mu_R, bounds.low, bounds.high)

    def _metrics(
        self, branch: str, group: Sequence[Scored], scores: Sequence[float], num_kept: int
    ) -> dict[str, float]:
        """The per-branch diagnostics of a step."""
        weight = np.concatenate([self._importance(item) for item in group]).astype(np.float64)
        low, median, high = np.quantile(scores, [0.1, 0.5, 0.9])
        values = {
            "selected_fraction": num_kept / len(group),
            "score_mean": float(np.mean(scores)),
            "score_p10": float(low),
            "score_p50": float(median),
            "score_p90": float(high),
            "importance": float(weight.mean()),
            "masked_fraction": float((weight == 0).mean()),
            **rollout_metrics(group),
        }
        return {f"{branch}/{name}": value for name, value in values.items()}


@dataclass(frozen=True)
class Camopd(Mopd):
    """CaMOPD: alternate the branches, keep the samples with the gap mass, scale recovery."""

    branches: Mapping[str, SelectiveBranchConfig]

    def keep(self, branch: str, scores: Sequence[float]) -> list[int]:
        """Eq. (8): the samples that hold rho_b of the branch's gap mass."""
        return select_by_mass(scores, self.branches[branch].mass)

    def scale(self, branch: str) -> float:
        """r_b of Eq. (9)."""
        return self.branches[branch].scale


def make(config: RunConfig, tokenizer: PreTrainedTokenizerBase, state: Mapping[str, float]) -> Mopd:
    """The one or the other, as the configuration says; neither learns anything of the run."""
    algorithm = config.algorithm
    if isinstance(algorithm, CamopdConfig):
        return make_camopd(algorithm, config.batch.size)
    assert isinstance(algorithm, MopdConfig)
    return make_mopd(algorithm, config.batch.size)


def make_mopd(config: MopdConfig, batch_size: int) -> Mopd:
    """Both branches at every step."""
    num_general = round(batch_size * config.general_share)
    draws = {"general": num_general, "domain": batch_size - num_general}
    period = ({name: count for name, count in draws.items() if count},)
    return Mopd(config.branches, config.importance, period)


def make_camopd(config: CamopdConfig, batch_size: int) -> Camopd:
    """One branch a step: `schedule.general` of the one, then `schedule.domain` of the other."""
    schedule = config.schedule
    period = ({"general": batch_size},) * schedule.general + (
        {"domain": batch_size},
    ) * schedule.domain
    branches = {"general": config.general, "domain": config.domain}
    return Camopd(branches, config.importance, period)


def _score(branch: str, scored: Scored) -> float:
    """s_b of Eq. (6)-(7). Raises `FloatingPointError` where it is no number to select by."""
    score = SCORES[branch](scored.gap_R)
    if not math.isfinite(score):
        raise FloatingPointError(
            f"branch {branch}: found the score {score} of prompt {scored.rollout.prompt.id!r}, "
            "expected a finite number: student or teacher gave a token no finite log-probability"
        )
    return score
