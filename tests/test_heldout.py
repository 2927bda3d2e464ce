"""Held-out divergences: texts sampled once, measured on the same tokens ever after."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megadistill.config.schema import AnswersConfig, HeldoutConfig
from megadistill.data.pools import PromptPool
from megadistill.evaluate.heldout import Heldout, answer_texts, teacher_texts
from megadistill.types import FloatArray, Prompt, Rollout, TokenSpan
from tests.fake_engines import FakeTrainingEngine
from tests.tiny import float32, make_prompt, make_rollout, make_tokenizer

CONFIGS = {
    "recovery": HeldoutConfig(pool="general", teacher="base", prompts=3, max_tokens=5),
    "domain": HeldoutConfig(pool="medical", teacher="specialist", prompts=2, max_tokens=4),
}


class FakeTrainer(FakeTrainingEngine):
    """Measures what it is told to, and keeps what it was asked."""

    def __init__(self, values: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
        super().__init__()
        self.values = values
        self.compared: list[tuple[str, str, list[list[int]]]] = []

    def divergences(
        self, student: str, teacher: str, spans: Sequence[TokenSpan]
    ) -> tuple[FloatArray, FloatArray]:
        self.compared.append((student, teacher, [span.token_ids_N.tolist() for span in spans]))
        forward, reverse = self.values[teacher]
        assert len(forward) == len(reverse) == len(spans)
        return float32(forward), float32(reverse)


class FakeTeachers:
    """Answers each prompt with as many tokens as it may."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str], int]] = []

    def sample(self, teacher: str, prompts: Sequence[Prompt], max_tokens: int) -> list[Rollout]:
        self.asked.append((teacher, [prompt.id for prompt in prompts], max_tokens))
        return [make_rollout([-1.0] * max_tokens, prompt=prompt) for prompt in prompts]


def make_pools() -> dict[str, PromptPool]:
    return {
        name: PromptPool(
            name=name,
            train=[make_prompt(f"{name}-train", pool=name)],
            heldout=[make_prompt(f"{name}-{index}", pool=name) for index in range(4)],
            num_dropped=0,
            seed=0,
        )
        for name in ("general", "medical")
    }


VALUES = {"base": ((0.1, 0.2, 0.6), (0.3, 0.3, 0.3)), "specialist": ((1.0, 3.0), (0.0, 0.5))}


def prepare(
    file: Path,
    teachers: FakeTeachers,
    rank: int = 0,
    configs: Mapping[str, HeldoutConfig] = CONFIGS,
) -> Heldout:
    engine = FakeTrainingEngine(rank=rank)
    texts = teacher_texts(configs, make_pools(), file, teachers.sample, engine)
    return Heldout(texts=texts, teachers={name: one.teacher for name, one in configs.items()})


def test_teachers_answer_the_first_heldout_prompts_of_their_pool(tmp_path: Path) -> None:
    teachers = FakeTeachers()
    prepare(tmp_path / "heldout.json", teachers)
    assert teachers.asked == [
        ("base", ["general-0", "general-1", "general-2"], 5),
        ("specialist", ["medical-0", "medical-1"], 4),
    ]


def test_measurements_are_means_with_standard_errors(tmp_path: Path) -> None:
    metrics = prepare(tmp_path / "heldout.json", FakeTeachers()).measure(FakeTrainer(VALUES))
    spread = np.std([0.1, 0.2, 0.6], ddof=1) / np.sqrt(3)
    expected = {
        "heldout/recovery/forward_kl": 0.3,
        "heldout/recovery/forward_kl_stderr": spread,
        "heldout/recovery/reverse_kl": 0.3,
        "heldout/recovery/reverse_kl_stderr": 0.0,
        "heldout/domain/forward_kl": 2.0,
        "heldout/domain/forward_kl_stderr": 1.0,
        "heldout/domain/reverse_kl": 0.25,
        "heldout/domain/reverse_kl_stderr": 0.25,
    }
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_the_student_is_measured_against_each_teacher_on_whole_sequences(tmp_path: Path) -> None:
    trainer = FakeTrainer(VALUES)
    prepare(tmp_path / "heldout.json", FakeTeachers()).measure(trainer)
    assert trainer.compared == [
        ("student", "base", [[11, 12, 13, 20, 21, 22, 23, 24]] * 3),
        ("student", "specialist", [[11, 12, 13, 20, 21, 22, 23]] * 2),
    ]


def test_one_prompt_has_no_spread(tmp_path: Path) -> None:
    configs = {"x": HeldoutConfig(pool="general", teacher="base", prompts=1, max_tokens=2)}
    heldout = prepare(tmp_path / "heldout.json", FakeTeachers(), configs=configs)
    metrics = heldout.measure(FakeTrainer({"base": ((0.5,), (0.25,))}))
    assert metrics["heldout/x/forward_kl"] == 0.5
    assert metrics["heldout/x/forward_kl_stderr"] == 0.0


def test_a_resumed_run_measures_on_the_same_texts_without_asking_again(tmp_path: Path) -> None:
    file = tmp_path / "heldout.json"
    first, again = FakeTrainer(VALUES), FakeTrainer(VALUES)
    prepare(file, FakeTeachers()).measure(first)
    teachers = FakeTeachers()
    metrics = prepare(file, teachers).measure(again)
    assert teachers.asked == []
    assert again.compared == first.compared
    assert metrics["heldout/domain/forward_kl"] == pytest.approx(2.0)


def test_only_the_writer_keeps_the_texts(tmp_path: Path) -> None:
    file = tmp_path / "heldout.json"
    prepare(file, FakeTeachers(), rank=1)
    assert not file.exists()
    prepare(file, FakeTeachers(), rank=0)
    assert file.exists()


class LengthScorer(FakeTrainingEngine):
    """Gives token number n of an answer the log-probability -n, and keeps what it was asked."""

    def score(self, model: str, spans: Sequence[TokenSpan]) -> list[FloatArray]:
        self.asked.append((model, [span.token_ids_N.tolist() for span in spans]))
        return [float32([-float(n) for n in range(1, span.num_scored + 1)]) for span in spans]


def answered_pool() -> dict[str, PromptPool]:
    prompts = [
        replace(make_prompt(f"q{number}", pool="refined"), answer=answer)
        for number, answer in enumerate(("one two three", "two", "three one"))
    ]
    pool = PromptPool(name="refined", train=prompts[2:], heldout=prompts, num_dropped=0, seed=0)
    return {"refined": pool}


def test_answers_are_measured_with_their_end_token() -> None:
    tokenizer = make_tokenizer(["one two three"])
    configs = {"domain": AnswersConfig(pool="refined", prompts=2)}
    trainer = LengthScorer()
    metrics = Heldout(texts=answer_texts(configs, answered_pool(), tokenizer)).measure(trainer)
    # Four and two scored tokens: means (1+2+3+4)/4 and (1+2)/2.
    assert metrics == pytest.approx(
        {"heldout/domain/nll": 2.0, "heldout/domain/nll_stderr": 0.5}, abs=1e-6
    )
    ((model, ids),) = trainer.asked
    assert model == "student"
    assert [found[:3] for found in ids] == [[11, 12, 13]] * 2
    assert [found[-1] for found in ids] == [tokenizer.eos_token_id] * 2


def test_held_out_answers_must_be_there() -> None:
    pools = make_pools()
    configs = {"domain": AnswersConfig(pool="medical", prompts=2)}
    with pytest.raises(ValueError, match="has no answer"):
        answer_texts(configs, pools, make_tokenizer(["one"]))
