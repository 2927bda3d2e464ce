"""Bad input gets one clear error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megadistill.head import (
    VocabularyHead,
    divergences,
    forward_kl,
    logprobs,
    score,
    weighted_nll,
)

IDS_T = torch.zeros(4, dtype=torch.int64)
WEIGHTS_T = torch.ones(4)


def head(**changes: Any) -> VocabularyHead:  # the fields of several types
    fields = {"weight_VD": torch.ones(10, 3), "vocab_size": 9, **changes}
    return VocabularyHead(**fields)


def hidden() -> torch.Tensor:
    return torch.ones(4, 3)


def with_nan() -> torch.Tensor:
    hidden_TD = hidden()
    hidden_TD[2, 1] = torch.nan
    return hidden_TD


ERRORS: dict[str, tuple[str, Callable[[], object]]] = {
    "id too large": ("0..8", lambda: score(head(), hidden(), IDS_T[:, None] + 9)),
    "id negative": ("0..8", lambda: weighted_nll(head(), hidden(), IDS_T - 1, WEIGHTS_T)),
    "ids of another type": ("int64", lambda: score(head(), hidden(), IDS_T[:, None].int())),
    "ids without K": ("ids_TK", lambda: logprobs(head(), hidden(), IDS_T)),
    "ids of other rows": ("ids_TK", lambda: logprobs(head(), hidden(), IDS_T[:3, None])),
    "more ids than vocabulary": (
        "K is 10",
        lambda: score(head(), hidden(), IDS_T[:, None].expand(-1, 10)),
    ),
    "top_k beyond vocabulary": (
        "top_k",
        lambda: score(head(), hidden(), IDS_T[:, None], top_k=10),
    ),
    "targets of other rows": (
        "targets_T",
        lambda: weighted_nll(head(), hidden(), IDS_T[:3], WEIGHTS_T),
    ),
    "weights of other rows": (
        "weights_T",
        lambda: weighted_nll(head(), hidden(), IDS_T, WEIGHTS_T[:3]),
    ),
    "weights with gradient": (
        "frozen",
        lambda: weighted_nll(head(), hidden(), IDS_T, torch.ones(4, requires_grad=True)),
    ),
    "hidden of another width": (
        "hidden_TD",
        lambda: score(head(), hidden()[:, :2], IDS_T[:, None]),
    ),
    "hidden of another type": (
        "float64",
        lambda: score(head(), hidden().double(), IDS_T[:, None]),
    ),
    "no rows": ("no rows", lambda: score(head(), hidden()[:0], IDS_T[:0, None])),
    "NaN": ("NaN", lambda: score(head(), with_nan(), IDS_T[:, None])),
    "temperature zero": (
        "temperature",
        lambda: score(head(), hidden(), IDS_T[:, None], temperature=0.0),
    ),
    "temperature NaN": (
        "temperature",
        lambda: logprobs(head(), hidden(), IDS_T[:, None], temperature=float("nan")),
    ),
    "two vocabularies": (
        "vocabulary",
        lambda: divergences(head(), hidden(), head(vocab_size=8), hidden()),
    ),
    "teacher with other rows": (
        "same rows",
        lambda: forward_kl(head(), hidden(), head(), hidden()[:3], WEIGHTS_T),
    ),
    "vocabulary beyond the weight": ("vocab_size", lambda: head(vocab_size=11)),
    "empty vocabulary": ("vocab_size", lambda: head(vocab_size=0)),
    "weight that is no matrix": ("2-D", lambda: head(weight_VD=torch.ones(10))),
    "integer weight": ("float", lambda: head(weight_VD=torch.ones(10, 3, dtype=torch.int64))),
    "empty chunks": ("chunk_tokens", lambda: head(chunk_tokens=0)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_one_clear_error(name: str) -> None:
    words, call = ERRORS[name]
    with pytest.raises(ValueError, match=words):
        call()
