"""Reasons to reject a rewrite or a fused answer: empty, talking of its task, or another result."""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_AMOUNT = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_CLOSING = r"[.\s*`]*"
_FINAL = (
    re.compile(r"####[ \t]*(.+)"),
    re.compile(r"(?:final answer(?: is)?|the answer is)[*_\s]*[:\-]?[*_\s]*(.+)", re.IGNORECASE),
)
_LETTER = re.compile(rf"\(?([A-Ja-j])(?:[).:]|{_CLOSING}$)")
APOSTROPHE = "\u2019"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The reject list and whether a final answer must stay."""

    phrases: Sequence[str]
    openings: Sequence[str]
    check_final_answer: bool


def rejection_reason(text: str, answer: str, rules: Rules) -> str | None:
    """Why `text` cannot stand for `answer`; None when nothing speaks against it."""
    lowered = text.lower().replace(APOSTROPHE, "'")
    if not text.strip():
        return "empty"
    if any(phrase.lower() in lowered for phrase in rules.phrases):
        return "mentions_task"
    if any(lowered.lstrip().startswith(opening.lower()) for opening in rules.openings):
        return "mentions_task"
    if rules.check_final_answer and not same_final_answer(text, answer):
        return "other_final_answer"
    return None


def same_final_answer(text: str, answer: str) -> bool:
    """Whether `text` ends in the final answer of `answer`, if that has one that can be checked."""
    wanted = final_answer(answer)
    if wanted is None:
        return True
    found = final_answer(text)
    if found is None and _NUMBER.fullmatch(wanted):
        numbers = _AMOUNT.findall(text)
        found = _normalised(numbers[-1]) if numbers else None
    return found == wanted


def final_answer(text: str) -> str | None:
    """The last answer that is marked as final (box, `####`, `Final answer:`), normalised."""
    if (boxed := _last_boxed(text)) is not None:
        return _normalised(boxed)
    for pattern in _FINAL:
        if found := pattern.findall(text):
            return _normalised(found[-1])
    return None


def _last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, whose braces may nest."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return None


def _normalised(text: str) -> str:
    """A number without its dress, an option's letter, or the text in lower case."""
    bare = text.strip().strip(string.whitespace + "$*`_.").replace("\\$", "").strip()
    if (amount := _AMOUNT.match(bare)) and not re.search(r"\d", bare[amount.end() :]):
        number = amount[0].replace(",", "")
        return f"{float(number):.12g}" if _NUMBER.fullmatch(number) else number
    if letter := _LETTER.match(bare):
        return letter[1].upper()
    return " ".join(bare.lower().split())
