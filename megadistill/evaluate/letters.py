"""The letter that an answer chooses among an item's options (ALGORITHMS 5.4, and common other forms)."""

import re
from collections.abc import Mapping

ANY = dict.fromkeys("ABCDEFGHIJ", "")
_ANNOUNCED = re.compile(
    r"final\s+answer[\s*_`]*(?:is\b[\s*_`]*[:\uff1a]?|[:\uff1a])[\s*_`>]*", re.IGNORECASE
)
_BOXED = re.compile(r"\\boxed\s*\{")
_LEAD_IN = re.compile(
    r"(?:(?:I (?:think|believe|choose|pick)|it|that|the|correct|best|answer|option|choice|is|would be)"
    r"\b[\s:]*)+",
    re.IGNORECASE,
)
_MACRO = re.compile(r"\\[a-zA-Z]+\s*")
_LETTER = re.compile(r"(?P<open>[\s\W_]*)(?P<letter>[A-J])(?![\w'\u2019])(?P<rest>.*)")
_CLOSED = re.compile(r"\s*[\])}$*_`\"]")


def final_letter(text: str, choices: Mapping[str, str] = ANY) -> str | None:
    """The letter after the last `Final answer:`, else in the last box; None when neither has one.

    `choices`: letter -> text of the item's options (texts may be unknown, ""). A word is not a
    letter, nor are the article and the pronoun when words follow.
    """
    for pattern in (_ANNOUNCED, _BOXED):
        ends = [found.end() for found in pattern.finditer(text)]
        if ends:
            return _letter_of(text[ends[-1] :].partition("\n")[0], choices)
    return None


def _letter_of(text: str, choices: Mapping[str, str]) -> str | None:
    plain = _MACRO.sub(" ", text.partition("\\boxed")[2] or text).strip()
    plain = plain.removeprefix("{").strip()
    lead_in = _LEAD_IN.match(plain)
    found = _LETTER.match(plain[lead_in.end() :] if lead_in else plain)
    if found is None or found["letter"] not in choices:
        return None
    letter, rest = found["letter"], found["rest"]
    return letter if _CLOSED.match(rest) or _may_follow(rest, letter, choices[letter]) else None


def _may_follow(rest: str, letter: str, option: str) -> bool:
    """Whether what stands behind the letter leaves it one."""
    words = rest.lstrip(" .").rstrip(" .}*$").casefold()
    is_option = bool(option) and words != "" and option.casefold().startswith(words[:12])
    if is_option or not words:
        return True
    if rest.startswith("."):  # `E. coli`, `C. Left hemisection`
        return not option or not rest.lstrip(" .")[0].islower()
    return not (rest[0].isspace() and words[0].isalnum() and letter in "AI")
