"""The reject list and the rule for answers that can be checked."""

import pytest

from megadistill.config.refine import RewriteConfig
from megadistill.refine.checking import final_answer, rejection_reason, same_final_answer
from megadistill.refine.rewriting import rules_of

RULES = rules_of(RewriteConfig(model="m"))


@pytest.mark.parametrize(
    "text",
    [
        "As the Reference Answer says, rest.",
        "Here is my response: rest.",
        "Compare your response with it.",
        "In YOUR OWN RESPONSE you may rest.",
        "Now it's your turn to rest.",
        "Now it\u2019s your turn to rest.",
        "  your turn: rest.",
    ],
)
def test_rewrites_that_talk_of_their_task_are_rejected(text: str) -> None:
    assert rejection_reason(text, "Rest.", RULES) == "mentions_task"


@pytest.mark.parametrize("text", ["It is your turning point.", "Rest, and refer to the answer."])
def test_other_rewrites_are_not(text: str) -> None:
    assert rejection_reason(f"So: {text}", "Rest.", RULES) is None


def test_empty_rewrites_are_rejected() -> None:
    assert rejection_reason(" \n", "Rest.", RULES) == "empty"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so it goes\n#### 1,234", "1234"),
        ("#### $5.00", "5"),
        (r"thus \boxed{\frac{1}{2}} holds", r"\frac{1}{2}"),
        (r"\boxed{7", None),
        ("Final answer: C. Left hemisection", "C"),
        ("**Final answer:** (b)", "B"),
        ("The answer is 42 apples.", "42"),
        ("The final answer is 3/4.", "3/4"),
        ("Final answer: a long story", "a long story"),
        ("Rest and drink.", None),
    ],
)
def test_final_answers_are_found(text: str, found: str | None) -> None:
    assert final_answer(text) == found


@pytest.mark.parametrize(
    ("text", "answer", "same"),
    [
        ("It makes 72 in all.", "48 + 24 = 72\n#### 72", True),
        ("It makes 72.0, of 80.", "#### 72", False),
        ("Hence #### 72.00", "#### 72", True),
        ("It makes many.", "#### 72", False),
        ("... Final answer: D", "... Final answer: C. Left", False),
        ("... final answer is (C).", "... Final answer: C. Left", True),
        ("... the left one.", "... Final answer: C. Left", False),
        ("Anything.", "Rest.", True),
    ],
)
def test_a_checkable_answer_must_stay(text: str, answer: str, same: bool) -> None:
    assert same_final_answer(text, answer) == same
    assert (rejection_reason(text, answer, RULES) is None) == same
    lenient = rules_of(RewriteConfig(model="m", check_final_answer=False))
    assert rejection_reason(text, answer, lenient) is None
