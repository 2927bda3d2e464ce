"""What a run takes from its models before it loads them."""

from pathlib import Path

import pytest

from megadistill.assemble import TEACHER_WORDS, longest_answered
from tests.tiny import camopd_tree, make_config, raft_tree, sft_tree, write_model_config


@pytest.mark.parametrize(("asked", "sft", "raft"), [(50, 50, 50), (150, 150, 104), (999, 200, 104)])
def test_answers_are_bounded_by_what_the_contexts_hold(
    tmp_path: Path, asked: int, sft: int, raft: int
) -> None:
    student = {"path": str(write_model_config(tmp_path / "student", max_position_embeddings=200))}
    teacher = {"path": str(write_model_config(tmp_path / "teacher", max_position_embeddings=184))}
    tree = sft_tree(student=student)
    tree["algorithm"] |= {"max_tokens": asked}
    assert longest_answered(make_config(tree)) == sft
    tree = raft_tree(student=student, teachers={"general": teacher}, rollout={"max_tokens": 16})
    tree["algorithm"] |= {"max_tokens": asked}
    assert longest_answered(make_config(tree)) == raft == min(asked, 184 - 16 - TEACHER_WORDS)


def test_without_answers_nothing_is_bounded() -> None:
    assert longest_answered(make_config(camopd_tree())) is None
