"""MedQA-USMLE, MedXpertQA-Text and held-out questions of ours, which end with `Final answer: <letter>`."""

import re
from collections.abc import Mapping
from typing import Any

from megadistill.data.pools import is_heldout
from megadistill.evaluate.protocol import Benchmark, Item, Score, user
from megadistill.inference.requests import SamplingParams

LETTERS = "ABCDEFGHIJ"
INSTRUCTION = "Reason step by step, then end with a line `Final answer: <letter>`."
HELDOUT_FRACTION = 0.12
"""`data.heldout_fraction` of configs/embedded/_data.yaml."""
_FINAL = re.compile(r"(?i:Final answer)\**:[\s*]*\(?([A-J])\b")
"""As the protocol has it (ALGORITHMS 5.4), with stars also around the words or the colon."""
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?([A-J])")


def final_letter(text: str) -> str | None:
    """The letter after the last `Final answer:`, else in the last box; None when neither is there."""
    for pattern in (_FINAL, _BOXED):
        if found := pattern.findall(text):
            return str(found[-1])
    return None


def score(item: Item, answer: str) -> Score:
    """Exact match of the letter."""
    letter = final_letter(answer)
    right = letter == item.reference
    return Score(value=float(right), extracted=letter, details={"no_answer": float(letter is None)})


def to_item(row: Mapping[str, Any]) -> Item:
    """`question`, `options` (a mapping from letter to text) and `answer_idx` or `label`."""
    options = row["options"]
    letter = row["label"] if "label" in row else row["answer_idx"]
    if not isinstance(options, dict) or "".join(options) != LETTERS[: len(options)]:
        raise ValueError(f"options are {str(options)[:60]!r}, expected letters A, B, ... in order")
    if letter not in options:
        raise ValueError(f"the answer is {letter!r}, expected one of {', '.join(options)}")
    lines = [row["question"], *(f"{key}. {text}" for key, text in options.items())]
    return Item(
        id=str(row.get("id", row["row"])),
        messages=user("\n".join([*lines, "", INSTRUCTION])),
        text="\n".join([row["question"], *options.values()]),
        reference=letter,
    )


def to_heldout_item(row: Mapping[str, Any]) -> Item | None:
    """A packaged question that the embedded runs never train on."""
    if not is_heldout(row["id"], HELDOUT_FRACTION):
        return None
    return to_item({**row, "label": row["answer"]})


MEDQA = Benchmark(
    title="MedQA-USMLE",
    block="domain",
    sampling=SamplingParams(max_tokens=32768),
    rows=to_item,
    score=score,
    hint=(
        "the 4-option test split as JSONL with question, options {A..D} and answer_idx: "
        "`hf download GBaker/MedQA-USMLE-4-options --repo-type dataset`"
    ),
    size=1273,
)
MEDXPERTQA = Benchmark(
    title="MedXpertQA-Text",
    block="domain",
    sampling=SamplingParams(max_tokens=32768),
    rows=to_item,
    score=score,
    hint=(
        "the test split of the Text part as JSONL with question, options {A..J} and label: "
        "`hf download TsinghuaC3I/MedXpertQA --repo-type dataset`"
    ),
    size=2450,
)
MEDICAL_HELDOUT = Benchmark(
    title="Medical questions, held out",
    block="domain",
    sampling=SamplingParams(max_tokens=32768),
    rows=to_heldout_item,
    score=score,
    packaged="megadistill/data/sets/medical_questions.jsonl",
    hint="`path: packaged` takes the questions that ship with this package",
    size=28,
)
