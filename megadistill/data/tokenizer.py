"""A model's tokenizer, and a chat as the token ids that the model reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megadistill.resolve import resolve
from megadistill.types import Message


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, which is named as in a configuration."""
    directory = resolve("model", str(model))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    return tokenizer


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that the tokenizer reads as something other than text, such as the end of a turn."""
    return [
        str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special
    ]


def chat_ids(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    enable_thinking: bool | None = None,
) -> list[int]:
    """Token ids up to where the answer is to begin; a last assistant turn is its beginning."""
    opened = messages[-1]["role"] == "assistant"
    # `Any`, because the method has many other keyword arguments, of many types.
    switches: dict[str, Any] = (
        {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    )
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=False,
        add_generation_prompt=not opened,
        continue_final_message=opened,
        **switches,
    )
    ids: list[int] = tokenizer.encode(str(text), add_special_tokens=False)
    return ids


def answer_opening(tokenizer: PreTrainedTokenizerBase, enable_thinking: bool | None = None) -> str:
    """The last few tokens before an answer begins, such as those that open a thought."""
    prompt = chat_ids([{"role": "user", "content": "?"}], tokenizer, enable_thinking)
    return str(tokenizer.decode(prompt[-8:]))
