"""The tokens with which a chat template begins an answer."""

import pytest

from megadistill.data.tokenizer import answer_opening
from megadistill.inference.requests import open_thought, without_thinking
from tests.tiny import CHAT_TEMPLATE, make_tokenizer


@pytest.mark.parametrize(("opening", "answer"), [("", "a b"), (" <think>", "")])
def test_an_answer_that_its_template_began_inside_a_thought_is_none(
    opening: str, answer: str
) -> None:
    tokenizer = make_tokenizer(["<think> ? a b"])
    tokenizer.chat_template = f"{CHAT_TEMPLATE}{opening}"
    assert answer_opening(tokenizer).endswith(opening.strip() or "<|assistant|>")
    assert without_thinking(open_thought(answer_opening(tokenizer), "a b")) == answer
    assert without_thinking(open_thought(answer_opening(tokenizer), "b </think> a b")) == "a b"
