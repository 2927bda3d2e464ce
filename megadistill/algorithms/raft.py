"""RAFT, stage 2: learn refined answers, and to answer alone as the teacher does with the answer.

Formulas: RAFT, arXiv:2606.00147. Shape legend: R response tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from megadistill.algorithms.diagnostics import rollout_metrics, token_means
from megadistill.algorithms.protocol import (
    Loss,
    Measure,
    ScoringPlan,
    Selection,
    response_span,
)
from megadistill.algorithms.sft import answer_sample
from megadistill.config.algorithm import RaftConfig
from megadistill.config.distillation import BranchConfig
from megadistill.config.schema import DataConfig, RunConfig
from megadistill.data.pools import answer_ids
from megadistill.data.tokenizer import chat_ids, text_ids
from megadistill.losses import answer_conditioned
from megadistill.types import Prompt, Rollout, Sample, Scored, ScoreRequest, StepResult, TokenSpan

BRANCH = "domain"

TEACHER_WORDS = 64
"""Tokens, at most, that the teacher reads around question and answer."""

TINY = 1e-8
"""Keeps lambda finite, Eq. (12)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Moving averages of both losses, Eq. (11), from zero."""

    sft: float = 0.0
    kl: float = 0.0
    steps: int = 0

    def after(self, sft: float, kl: float, beta: float) -> "Moments":
        """m = beta m + (1 - beta) L, of both."""
        return Moments(
            sft=beta * self.sft + (1 - beta) * sft,
            kl=beta * self.kl + (1 - beta) * kl,
            steps=self.steps + 1,
        )

    def ratio(self, beta: float) -> float:
        """lambda of Eq. (12): the quotient of the bias-corrected averages."""
        correction = 1 - beta**self.steps
        return (self.sft / correction) / (self.kl / correction + TINY)


@dataclass
class Raft:
    """SFT on the refined answers plus answer-conditioned distillation on the student's own."""

    config: RaftConfig
    data: DataConfig
    batch_size: int
    tokenizer: PreTrainedTokenizerBase
    moments: Moments = field(default_factory=Moments)
    balance: float = 0.0
    """lambda of the last step."""

    @property
    def branches(self) -> Mapping[str, BranchConfig]:
        return self.config.all_branches()

    @property
    def scoring(self) -> ScoringPlan:
        """Eq. (9): the teacher's K most probable ids, at the temperature of Eq. (8)."""
        config = self.config
        return ScoringPlan(teacher=ScoreRequest(top_k=config.top_k, temperature=config.temperature))

    def draws(self, step: int) -> Mapping[str, int]:
        """One branch, always."""
        return {BRANCH: self.batch_size}

    def teacher_spans(self, rollouts: Sequence[Rollout]) -> list[TokenSpan]:
        """Eq. (7): the response behind a prompt that holds the answer, as `context` says."""
        prompts = [rollout.prompt for rollout in rollouts]
        givers = prompts[1:] + prompts[:1] if self.config.context == "other" else prompts
        return [
            TokenSpan(
                token_ids_N=np.asarray(
                    [*self._teacher_prompt(rollout.prompt, giver), *rollout.response_ids_R],
                    dtype=np.int32,
                ),
                num_scored=len(rollout.response_ids_R),
            )
            for rollout, giver in zip(rollouts, givers, strict=True)
        ]

    def select(self, scored: Sequence[Scored]) -> Selection:
        """Every response, with weight 1 / (N L_i) a token as in Eq. (10), and every answer."""
        samples = [self._response(item, len(scored)) for item in scored]
        if self.config.sft:
            samples += [
                answer_sample(prompt, answer_ids(prompt, self.tokenizer), len(scored))
                for prompt in (item.rollout.prompt for item in scored)
            ]
        metrics = rollout_metrics(scored)
        return Selection(
            samples=samples,
            selected=range(len(scored)),
            scores={index: float(np.mean(item.gap_R)) for index, item in enumerate(scored)},
            metrics={f"{BRANCH}/{name}": value for name, value in metrics.items()},
        )

    def loss(self, measure: Measure) -> Loss:
        """Eq. (12). `exact` needs both losses before the step; `lagged` takes the averages so far."""
        config = self.config
        loss = partial(
            answer_conditioned, temperature=config.temperature, tail_bucket=config.tail_bucket
        )
        if config.balance == "fixed":
            self.balance = config.weight
        else:
            moments = self.moments
            if config.lambda_mode == "exact" or moments.steps == 0:
                found = measure(partial(loss, balance=0.0))
                moments = moments.after(found["raft/sft"], found["divergence/loss"], config.beta)
            self.balance = min(moments.ratio(config.beta), config.lambda_max)
        return partial(loss, balance=self.balance)

    def observe(self, result: StepResult) -> dict[str, float]:
        """Feed both losses to the averages."""
        sums = result.metrics
        sft, kl = sums.get("raft/sft", 0.0), sums["divergence/loss"]
        rows = sums["divergence/rows"]
        self.moments = self.moments.after(sft, kl, self.config.beta)
        logged = {
            "raft/sft": sft,
            "raft/kl": kl,
            "raft/lambda": self.balance,
            "raft/lambda_clamped": float(self.balance == self.config.lambda_max),
            "raft/student_mass": sums["divergence/student_mass_sum"] / rows,
            "raft/teacher_mass": sums["divergence/teacher_mass_sum"] / rows,
        }
        return logged | token_means(
            {name: sums[name] for name in sums if name.startswith("train/")}
        )

    def state(self) -> dict[str, float]:
        """The averages; `make` takes them back."""
        return {"sft": self.moments.sft, "kl": self.moments.kl, "steps": self.moments.steps}

    def _response(self, scored: Scored, num_samples: int) -> Sample:
        length = len(scored.rollout.response_ids_R)
        return Sample(
            span=response_span(scored.rollout),
            weights_R=np.zeros(length, dtype=np.float32),
            divergence_weights_R=np.full(length, 1.0 / (num_samples * length), dtype=np.float32),
            top_k=scored.teacher.top_k,
        )

    def _teacher_prompt(self, prompt: Prompt, giver: Prompt) -> Sequence[int]:
        """Appendix H: the answer as background knowledge before the question."""
        if self.config.context == "none":
            return prompt.token_ids
        answer_ids(giver, self.tokenizer)  # refuses a record without an answer
        *earlier, last = prompt.messages
        text = (
            f"Background reference knowledge: {giver.answer}\n"
            f"Answer the question based on the reference knowledge: {last['content']}"
        )
        if self.config.teacher_prompt_style == "raw":
            return text_ids(f"{text}\nAnswer: ", self.tokenizer, add_special_tokens=True)
        turn = {"role": "user", "content": text}
        return chat_ids([*earlier, turn], self.tokenizer, self.data.enable_thinking, self.data.date)


def make(config: RunConfig, tokenizer: PreTrainedTokenizerBase, state: Mapping[str, float]) -> Raft:
    """With the moving averages that `state` holds."""
    assert isinstance(config.algorithm, RaftConfig)
    moments = Moments(**state)  # type: ignore[arg-type]
    return Raft(config.algorithm, config.data, config.batch.size, tokenizer, moments)
