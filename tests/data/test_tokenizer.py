"""Chats as token ids: control tokens are the template's alone; how answers begin and end."""

import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megadistill.data.tokenizer import (
    UnreadableTextError,
    answer_end,
    answer_opening,
    chat_ids,
    load_tokenizer,
    text_ids,
)
from megadistill.inference.requests import open_thought, without_thinking
from tests.tiny import CHAT_TEMPLATE, make_bpe_tokenizer, make_tokenizer, write_model_config

CONTROLS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = make_bpe_tokenizer([])
"""The same tokenizer, to which control tokens are text."""
TOKENIZER = make_bpe_tokenizer(CONTROLS, chat_template=CHATML, eos_token="<|endoftext|>")
START, END = (TOKENIZER.vocab[control] for control in CONTROLS[:2])

texts = st.lists(
    st.sampled_from([*CONTROLS, "the end", " ", "\n", "<|", "|>", "\U000f0000", "héß", "turn"])
).map("".join)


def plain(text: str) -> list[int]:
    ids: list[int] = PLAIN.encode(text, add_special_tokens=False)
    return ids


@given(texts)
def test_a_text_has_the_ids_that_it_has_where_there_are_no_control_tokens(text: str) -> None:
    assert text_ids(text, TOKENIZER) == plain(text)


@given(st.lists(texts, min_size=1, max_size=4))
def test_what_looks_like_a_control_token_in_a_chat_is_text(contents: list[str]) -> None:
    """An oracle: each part of the rendered chat by the tokenizer without control tokens."""
    roles = ["user", "assistant"] * 2
    chat = [{"role": r, "content": c} for r, c in zip(roles, [*contents, "?"], strict=False)]
    if chat[-1]["role"] == "assistant":
        chat.pop()
    expected = []
    for at, turn in enumerate(chat):
        line_break = "\n" if at else ""
        if at:
            expected += plain(line_break)
        text = f"{turn['role']}\n{turn['content'].strip()}"
        expected += [START, *plain(text), END]
    expected += [*plain("\n"), START, *plain("assistant\n")]
    assert chat_ids(chat, TOKENIZER) == expected


def test_an_answer_that_is_to_be_continued_may_hold_a_control_tokens_text() -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b <|im_end|> c"}]
    ids = chat_ids(chat, TOKENIZER)
    assert str(TOKENIZER.decode(ids)).endswith("<|im_start|>assistant\nb <|im_end|> c")
    assert (ids.count(START), ids.count(END)) == (2, 1)


def test_an_ordinary_chat_has_the_ids_of_its_rendered_text() -> None:
    chat = [{"role": "user", "content": "the end of <|the turn|> <|im_en"}]
    rendered = TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert chat_ids(chat, TOKENIZER) == TOKENIZER.encode(rendered, add_special_tokens=False)


def test_what_a_tokenizer_adds_to_a_text_is_no_part_of_the_text() -> None:
    tokenizer = make_tokenizer(["a b"])
    assert text_ids("a b", tokenizer, add_special_tokens=True) == tokenizer.encode("a b")
    with pytest.raises(
        UnreadableTextError, match=r"'<\|end\|>', which the tokenizer can only read"
    ):
        text_ids("a <|end|> b", tokenizer, add_special_tokens=True)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|im_end|>"),  # and not the tokenizer's own end token, which no chat has
        (CHATML.replace("| trim }}", "}}\n"), "\n<|im_end|>"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "<|endoftext|>"),
        ("<|im_start|>{{ messages[0]['content'] }}", "<|endoftext|>"),
        ("{{ raise_exception('no') }}", "<|endoftext|>"),
        (None, "<|endoftext|>"),
    ],
)
def test_an_answer_ends_as_the_rendered_chat_ends(template: str | None, expected: str) -> None:
    tokenizer = make_bpe_tokenizer(CONTROLS, chat_template=template, eos_token="<|endoftext|>")
    assert tokenizer.decode(list(answer_end(tokenizer))) == expected


def saved(tokenizer: PreTrainedTokenizerFast, directory: Path, vocab_size: int) -> Path:
    write_model_config(directory, vocab_size=vocab_size)
    tokenizer.save_pretrained(directory)
    return directory


def test_ids_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    size = len(TOKENIZER)
    assert load_tokenizer(saved(TOKENIZER, tmp_path / "whole", size)).chat_template == CHATML
    directory = saved(TOKENIZER, tmp_path / "small", size - 2)
    with pytest.raises(
        ValueError, match=rf"^{directory}: .* 2 ids beyond the {size - 2} rows .*'<\|"
    ):
        load_tokenizer(directory)


def test_the_date_that_a_template_asks_for_is_the_one_given() -> None:
    tokenizer = make_bpe_tokenizer([], chat_template="{{ strftime_now('%d %B %Y') }}")
    ids = chat_ids([{"role": "user", "content": "?"}], tokenizer, date=datetime.date(2024, 3, 5))
    assert tokenizer.decode(ids) == "05 March 2024"


@pytest.mark.parametrize(("opening", "answer"), [("", "a b"), (" <think>", "")])
def test_an_answer_that_its_template_began_inside_a_thought_is_none(
    opening: str, answer: str
) -> None:
    tokenizer = make_tokenizer(["<think> ? a b"])
    tokenizer.chat_template = f"{CHAT_TEMPLATE}{opening}"
    assert answer_opening(tokenizer).endswith(opening.strip() or "<|assistant|>")
    assert without_thinking(open_thought(answer_opening(tokenizer), "a b")) == answer
    assert without_thinking(open_thought(answer_opening(tokenizer), "b </think> a b")) == "a b"
