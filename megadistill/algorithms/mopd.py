"""MOPD and CaMOPD: one on-policy update that alternates between two teachers, or mixes them.

`Mopd` is the vanilla method. `Camopd` changes three of its decisions: which branch is active,
which samples are kept, and how strongly each branch pulls. Formulas: CaMOPD, arXiv:2605.27115.
Shape legend: R response tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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
from megadistill.config.algorithm import BranchConfig, CamopdConfig, ImportanceConfig, MopdConfig
from megadistill.types import FloatArray, Phase, Rollout, Sample, Scored, TokenSpan

SCORES: Mapping[str, Callable[[FloatArray], float]] = {
    "general": mean_absolute_gap,  # Eq. (6): recover wherever the two models differ
    "domain": mean_positive_gap,  # Eq. (7): preserve only what the domain teacher prefers
}


@dataclass(frozen=True)
class Mopd(Weighted):
    """Vanilla MOPD, Eq. (2)-(3): the sum of both branches' losses, over all their samples."""

    branches: Mapping[str, BranchConfig]
    importance: ImportanceConfig
    batch_size: int
    general_share: float
    top_k: TopKRequest | None = None

    @classmethod
    def of(cls, config: MopdConfig, batch_size: int) -> "Mopd":
        branches = {"general": config.general, "domain": config.domain}
        return cls(branches, config.importance, batch_size, config.general_share)

    def phase(self, step: int) -> Phase:
        """Both branches at every step."""
        num_general = round(self.batch_size * self.general_share)
        draws = {"general": num_general, "domain": self.batch_size - num_general}
        return Phase(step=step, draws={name: count for name, count in draws.items() if count})

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
            branch_scores = [SCORES[branch](scored[index].gap_R) for index in members]
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
            component=scored.branch,
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

    schedule: tuple[str, ...] = ()
    """One period of Eq. (5), e.g. general, general, general, domain."""

    @classmethod
    def of(cls, config: CamopdConfig, batch_size: int) -> "Camopd":  # type: ignore[override]
        period = ("general",) * config.schedule.general + ("domain",) * config.schedule.domain
        branches = {"general": config.general, "domain": config.domain}
        return cls(branches, config.importance, batch_size, 1.0, schedule=period)

    def phase(self, step: int) -> Phase:
        """Eq. (5): the branch at this place of the period, alone."""
        return Phase(step=step, draws={self.schedule[step % len(self.schedule)]: self.batch_size})

    def keep(self, branch: str, scores: Sequence[float]) -> list[int]:
        """Eq. (8): the samples that hold rho_b of the branch's gap mass."""
        return select_by_mass(scores, self.branches[branch].mass)

    def scale(self, branch: str) -> float:
        """r_b of Eq. (9)."""
        return self.branches[branch].scale
