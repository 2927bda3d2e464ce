"""RAFT's decisions: what the teacher reads, what is trained on, and the balance of the two losses."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import pytest

from megadistill.algorithms import Raft, make_algorithm
from megadistill.algorithms.protocol import Loss, response_span
from megadistill.algorithms.raft import TEACHER_WORDS, Moments
from megadistill.config import ConfigError
from megadistill.types import Prompt, Rollout, Scored, StepResult, TokenScores, TopK
from tests.tiny import Tree, float32, make_config, make_rollout, make_tokenizer, raft_tree

WORDS = (
    "Background reference knowledge: Answer the question based on reference Answer: what is it "
    "this that other"
)
TOKENIZER = make_tokenizer([WORDS])

SFT_LOSSES = (2.0, 1.5, 1.2)
KL_LOSSES = (0.5, 0.4, 0.1)
BALANCES = (4.0, 3.882353, 4.820809)
"""Worked example W7, beta = 0.9."""


def make_raft(state: Mapping[str, float] | None = None, **settings: Any) -> Raft:
    tree: Tree = raft_tree()
    tree["algorithm"] |= settings
    algorithm = make_algorithm(make_config(tree), TOKENIZER, state or {})
    assert isinstance(algorithm, Raft)
    return algorithm


def make_question(text: str, answer: str | None) -> Prompt:
    messages = ({"role": "user", "content": text},)
    ids = TOKENIZER.encode(f"<|user|> {text} <|end|> <|assistant|>")
    return Prompt(id=text, pool="medical", messages=messages, token_ids=tuple(ids), answer=answer)


def respond(prompt: Prompt, length: int = 3) -> Rollout:
    return make_rollout([-0.5] * length, prompt=prompt)


QUESTIONS = [make_question("what is it", "this"), make_question("what is that", "the other")]


def read(ids: Any) -> str:
    return str(TOKENIZER.decode(ids))


def make_scored(prompt: Prompt, length: int = 3) -> Scored:
    zeros_RK = np.zeros((length, 3))
    top_k = TopK(ids_RK=zeros_RK.astype(np.int32), logprobs_RK=float32(zeros_RK))
    return Scored(
        rollout=respond(prompt, length),
        branch="domain",
        student=TokenScores(logprobs_R=float32([-0.5] * length)),
        teacher=TokenScores(logprobs_R=float32([-0.25] * length), top_k=top_k),
    )


@pytest.mark.parametrize("style", ["chat", "raw"])
@pytest.mark.parametrize("context", ["answer", "none", "other"])
def test_the_teacher_scores_the_very_tokens_that_the_student_wrote(
    style: str, context: str
) -> None:
    rollouts = [respond(QUESTIONS[0], 3), respond(QUESTIONS[1], 5)]
    spans = make_raft(teacher_prompt_style=style, context=context).teacher_spans(rollouts)
    for span, rollout in zip(spans, rollouts, strict=True):
        own = response_span(rollout)
        assert span.num_scored == own.num_scored == len(rollout.response_ids_R)
        scored = span.token_ids_N[-span.num_scored :]
        assert scored.tolist() == rollout.response_ids_R.tolist()
        assert (len(span.token_ids_N) == len(own.token_ids_N)) == (context == "none")


@pytest.mark.parametrize("style", ["chat", "raw"])
def test_few_words_stand_around_question_and_answer(style: str) -> None:
    span = make_raft(teacher_prompt_style=style).teacher_spans([respond(QUESTIONS[1])])[0]
    added = len(span.token_ids_N) - span.num_scored - len(QUESTIONS[1].token_ids)
    assert 0 < added < TEACHER_WORDS / 2  # other tokenizers make more of a word than one token


def teacher_prompt(rollouts: list[Rollout], **settings: Any) -> str:
    """What the teacher reads before the first response."""
    span = make_raft(**settings).teacher_spans(rollouts)[0]
    return read(span.token_ids_N[: -span.num_scored])


def test_the_answer_comes_before_the_question_in_the_chat_template() -> None:
    assert teacher_prompt([respond(QUESTIONS[0])]) == (
        "<|user|> Background reference knowledge: this Answer the question based on the "
        "<unk> knowledge: what is it <|end|> <|assistant|>"
    ).replace("<unk>", "reference")


def test_a_raw_prompt_has_no_chat_template() -> None:
    assert teacher_prompt([respond(QUESTIONS[0])], teacher_prompt_style="raw") == (
        "Background reference knowledge: this Answer the question based on the reference "
        "knowledge: what is it Answer:"
    )


def test_without_context_the_teacher_reads_what_the_student_reads() -> None:
    assert teacher_prompt([respond(QUESTIONS[0])], context="none") == (
        "<|user|> what is it <|end|> <|assistant|>"
    )


def test_the_probe_shows_another_answer() -> None:
    found = teacher_prompt([respond(question) for question in QUESTIONS], context="other")
    assert "knowledge: the other Answer" in found
    assert "what is it" in found


def test_a_record_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="record 'what is it' has no answer"):
        make_raft().teacher_spans([respond(replace(QUESTIONS[0], answer=None))])


def test_a_step_trains_on_every_response_and_every_answer() -> None:
    selection = make_raft().select([make_scored(QUESTIONS[0], 2), make_scored(QUESTIONS[1], 4)])
    taught = [sample.divergence_weights_R for sample in selection.samples]
    assert [None if w is None else w.tolist() for w in taught] == [
        [0.25] * 2,
        [0.125] * 4,
        None,
        None,
    ]
    assert [sample.weights_R.any() for sample in selection.samples] == [False, False, True, True]
    assert [sample.top_k is not None for sample in selection.samples] == [True, True, False, False]
    answer = selection.samples[3].span
    assert read(answer.token_ids_N[-answer.num_scored :]) == "the other<|end|>".replace("<", " <")
    for name in ("gap", "log_ratio_absolute", "response_tokens", "capped_fraction"):
        assert f"domain/{name}" in selection.metrics
    assert selection.metrics["domain/gap"] == 0.25


def test_distillation_alone_trains_on_no_answer() -> None:
    alone = make_raft(sft=False, balance="fixed")
    selection = alone.select([make_scored(QUESTIONS[0])])
    assert [sample.top_k is not None for sample in selection.samples] == [True]


def test_distillation_alone_has_nothing_to_balance() -> None:
    with pytest.raises(ConfigError, match=r"balance: found ema with sft: false, expected fixed"):
        make_raft(sft=False)


def result_of(sft: float, kl: float) -> StepResult:
    sums = {"raft/sft": sft, "divergence/loss": kl, "divergence/rows": 2.0}
    sums |= {"divergence/student_mass_sum": 1.5, "divergence/teacher_mass_sum": 1.8}
    sums |= {"train/entropy_sum": 3.0, "train/rows": 2.0}
    return StepResult(loss=0.0, grad_norm=0.0, learning_rate=0.0, num_tokens=1, metrics=sums)


def balance_of(loss: Loss) -> float:
    return float(cast("partial[Any]", loss).keywords["balance"])


def forbidden(_loss: Loss) -> dict[str, float]:
    raise AssertionError("this balance needs no extra forward pass")


def test_exact_balance_is_the_worked_example() -> None:
    raft = make_raft(lambda_mode="exact")
    found = []
    for sft, kl in zip(SFT_LOSSES, KL_LOSSES, strict=True):

        def measure(loss: Loss, sft: float = sft, kl: float = kl) -> dict[str, float]:
            assert balance_of(loss) == 0.0
            return {"raft/sft": sft, "divergence/loss": kl}

        found.append(balance_of(raft.loss(measure)))
        raft.observe(result_of(sft, kl))
    assert found == pytest.approx(BALANCES, abs=1e-6)


def test_lagged_balance_follows_one_step_later_and_measures_only_once() -> None:
    raft = make_raft(lambda_mode="lagged")
    first = balance_of(raft.loss(lambda _: {"raft/sft": 2.0, "divergence/loss": 0.5}))
    found = [first]
    for sft, kl in zip(SFT_LOSSES, KL_LOSSES, strict=True):
        raft.observe(result_of(sft, kl))
        found.append(balance_of(raft.loss(forbidden)))
    assert found == pytest.approx([BALANCES[0], *BALANCES], abs=1e-6)


def test_a_resumed_run_has_the_same_balance() -> None:
    whole = make_raft()
    for sft, kl in zip(SFT_LOSSES, KL_LOSSES, strict=True):
        whole.observe(result_of(sft, kl))
    resumed = make_raft(state=whole.state())
    assert resumed.moments == whole.moments
    assert balance_of(resumed.loss(forbidden)) == balance_of(whole.loss(forbidden))


def test_a_fixed_balance_is_what_the_configuration_says() -> None:
    assert balance_of(make_raft(balance="fixed", weight=0.1).loss(forbidden)) == 0.1


def test_a_vanishing_distillation_loss_clamps_the_balance_and_says_so() -> None:
    raft = make_raft(lambda_max=7.0)
    assert balance_of(raft.loss(lambda _: {"raft/sft": 2.0, "divergence/loss": 0.0})) == 7.0
    assert raft.observe(result_of(2.0, 0.0))["raft/lambda_clamped"] == 1.0


def test_what_is_logged_of_a_step() -> None:
    raft = make_raft(balance="fixed", weight=2.0)
    raft.loss(forbidden)
    assert raft.observe(result_of(2.0, 0.5)) == {
        "raft/sft": 2.0,
        "raft/kl": 0.5,
        "raft/lambda": 2.0,
        "raft/lambda_clamped": 0.0,
        "raft/student_mass": 0.75,
        "raft/teacher_mass": 0.9,
        "entropy": 1.5,
    }


def test_averages_are_corrected_for_their_start() -> None:
    moments = Moments().after(2.0, 0.5, 0.9).after(1.5, 0.4, 0.9)
    assert moments.sft / (1 - 0.9**2) == pytest.approx(1.736842, abs=1e-6)
    assert moments.kl / (1 - 0.9**2) == pytest.approx(0.447368, abs=1e-6)
