"""A model's tokenizer, and a chat as the token ids that the model reads.

Control tokens, such as the end of a turn, come from chat templates alone: what looks like one in a
prompt or an answer is text.
"""

import datetime
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megadistill.config.rows import Message
from megadistill.data.tokenizer_files import check_ids
from megadistill.resolve import resolve

PRIVATE = 0xF0000
"""First of the characters that mean nothing; some stand for texts of control tokens in a chat."""


ONLY_CONTROL = "found the text {!r}, which the tokenizer can only read as a control token"


class UnreadableTextError(ValueError):
    """A chat that its template refuses, or a text that the tokenizer cannot read as text."""


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, which is named as in a configuration.

    Raises `ValueError` when it has ids for which the model has no embedding.
    """
    directory = resolve("model", str(model))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    check_ids(directory, tokenizer.get_vocab())
    return tokenizer


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that the tokenizer reads as something other than text, such as the end of a turn."""
    return list(_controls(tokenizer).values())


def text_ids(
    text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = False
) -> list[int]:
    """Token ids of a text, in which no control token is but those that the tokenizer adds.

    Raises `UnreadableTextError` where the tokenizer reads a part of the text as nothing else.
    """
    controls = _controls(tokenizer)
    found = [control for control in controls.values() if control in text]
    # Any, because tokenizers take switches of their own.
    switches: dict[str, Any] = {"split_special_tokens": True} if found else {}
    if found and controls.keys() & tokenizer.encode(text, add_special_tokens=False, **switches):
        raise UnreadableTextError(ONLY_CONTROL.format(*found))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens, **switches)
    return ids


def chat_ids(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    enable_thinking: bool | None = None,
    date: datetime.date | None = None,
) -> list[int]:
    """Token ids up to where the answer is to begin; a last assistant turn is its beginning.

    `date` is what the template takes for today. Raises `UnreadableTextError`.
    """
    opened = messages[-1]["role"] == "assistant"
    # `Any`, because the method has many other keyword arguments, of many types.
    switches: dict[str, Any] = {
        "add_generation_prompt": not opened,
        "continue_final_message": opened,
    }
    if enable_thinking is not None:
        switches["enable_thinking"] = enable_thinking
    if date is not None:
        switches["strftime_now"] = date.strftime
    whole = "".join(message["content"] for message in messages)
    found = [control for control in special_tokens(tokenizer) if control in whole]
    if not found:
        text = _rendered(messages, tokenizer, **switches)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids
    unused = (chr(code) for code in count(PRIVATE) if chr(code) not in whole)
    marks = dict(zip(unused, sorted(found, key=len, reverse=True), strict=False))
    text = _rendered([_marked(message, marks) for message in messages], tokenizer, **switches)
    return _ids_with_marks(text, marks, tokenizer)


def answer_opening(tokenizer: PreTrainedTokenizerBase, enable_thinking: bool | None = None) -> str:
    """The last few tokens before an answer begins, such as those that open a thought."""
    prompt = chat_ids([{"role": "user", "content": "?"}], tokenizer, enable_thinking)
    return str(tokenizer.decode(prompt[-8:]))


def answer_end(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What ends an answer in a rendered chat: mostly one control token.

    The tokenizer's own end token where there is no template, or it has none behind an answer. Raises
    `ValueError` when the tokenizer has none either.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError(
            f"student: its tokenizer has no end token (found {tokenizer.eos_token_id})"
        )
    return _turn_end(tokenizer, str(tokenizer.chat_template)) or (tokenizer.eos_token_id,)


@lru_cache(maxsize=8)
def _controls(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id -> text of each token that is no text."""
    return {
        number: str(token.content)
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and number != tokenizer.unk_token_id
    }


@lru_cache(maxsize=8)
def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[int, ...]:
    """Token ids behind an answer up to the first control token; none where there is no such."""
    answer = "megadistill"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = _rendered(chat, tokenizer)
    except ValueError:  # there is no template, or it has no such chats
        return ()
    ids = tokenizer.encode(text.rpartition(answer)[2], add_special_tokens=False)
    ends = [at for at, number in enumerate(ids) if number in _controls(tokenizer)]
    return tuple(ids[: ends[0] + 1]) if answer in text and ends else ()


def _rendered(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, **switches: Any
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, **switches
            )
        )
    except jinja2.TemplateError as error:
        raise UnreadableTextError(f"refused by the chat template: {error}") from None


def _marked(message: Message, marks: Mapping[str, str]) -> Message:
    """The message with a mark for each text of a control token."""
    content = message["content"]
    for mark, control in marks.items():
        content = content.replace(control, mark)
    return {**message, "content": content}


def _ids_with_marks(
    text: str, marks: Mapping[str, str], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Token ids of a rendered chat; what lies between control tokens and has a mark is read anew."""
    if not tokenizer.is_fast:  # it does not say where in a text its tokens lie
        raise UnreadableTextError(ONLY_CONTROL.format(*marks.values()))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = encoded["input_ids"], [*encoded["offset_mapping"], (len(text), len(text))]
    controls = [at for at, number in enumerate(ids) if number in _controls(tokenizer)]
    meant = {ord(mark): control for mark, control in marks.items()}
    result: list[int] = []
    first, begin = 0, 0
    for at in (*controls, len(ids)):
        between = text[begin : places[at][0]]
        if marks.keys().isdisjoint(between):
            result += ids[first:at]
        else:
            result += text_ids(between.translate(meant), tokenizer)
        result += ids[at : at + 1]
        first, begin = at + 1, places[at][1]
    return result
