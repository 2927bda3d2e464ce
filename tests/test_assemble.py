"""What a run takes from its models before it loads them."""

from pathlib import Path

import pytest

from megadistill.assemble import longest_answered
from megadistill.config import ConfigError, RunConfig
from tests.tiny import Tree, camopd_tree, make_config, raft_tree, sft_tree, write_model_config


@pytest.fixture
def models(tmp_path: Path) -> Tree:
    """A student with a context of 200 tokens, and a teacher with one of 184."""
    student = write_model_config(tmp_path / "student", max_position_embeddings=200)
    teacher = write_model_config(tmp_path / "teacher", max_position_embeddings=184)
    return {"student": {"path": str(student)}, "teachers": {"general": {"path": str(teacher)}}}


def raft(models: Tree, *, response: int = 16, **settings: str | int) -> RunConfig:
    tree = raft_tree(**models, rollout={"max_tokens": response})
    tree["algorithm"] |= settings
    return make_config(tree)


@pytest.mark.parametrize(("asked", "bound"), [(50, 50), (200, 200), (999, 200)])
def test_prompt_and_answer_must_fit_the_student(models: Tree, asked: int, bound: int) -> None:
    tree = sft_tree(student=models["student"])
    tree["algorithm"] |= {"max_tokens": asked}
    assert longest_answered(make_config(tree)) == bound
    assert longest_answered(raft(models, max_tokens=asked, context="none")) == bound


@pytest.mark.parametrize(("context", "room"), [("answer", 104), ("other", 52)])
def test_the_teacher_also_reads_a_response_and_words_around(
    models: Tree, context: str, room: int
) -> None:
    assert longest_answered(raft(models, context=context)) == room
    assert longest_answered(raft(models, context=context, max_tokens=room - 1)) == room - 1


def test_responses_that_leave_no_room_are_an_error(models: Tree) -> None:
    assert longest_answered(raft(models, response=119)) == 1
    with pytest.raises(
        ConfigError, match=r"rollout.max_tokens: found 120, .*teachers.general, 184"
    ):
        longest_answered(raft(models, response=120))


def test_without_answers_nothing_is_bounded() -> None:
    assert longest_answered(make_config(camopd_tree())) is None
