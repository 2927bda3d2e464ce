"""MedQA-USMLE, MedXpertQA-Text and held-out questions of ours, which end with `Final answer: <letter>`."""

from collections.abc import Mapping
from functools import partial

from megadistill.config.rows import RowConfig
from megadistill.data.formats import FORMATS
from megadistill.data.pools import is_heldout
from megadistill.data.records import Record
from megadistill.evaluate.letters import final_letter
from megadistill.evaluate.protocol import Benchmark, Fields, Item, Score, user

INSTRUCTION = "Reason step by step, then end with a line `Final answer: <letter>`."
HELDOUT_FRACTION = 0.12
"""`data.heldout_fraction` of configs/embedded/_data.yaml."""


def score(item: Item, answer: str) -> Score:
    """Exact match of the letter."""
    letter = final_letter(answer, item.choices)
    right = letter == item.reference
    return Score(value=float(right), extracted=letter, details={"no_answer": float(letter is None)})


def choice_item(name: str, question: str, options: Mapping[str, str], answer: str) -> Item:
    """A question with options, of which `answer` is a letter."""
    record = Record(id=name, prompt=question, options=options)
    return Item(
        id=name,
        messages=user(f"{record.question}\n\n{INSTRUCTION}"),
        text=record.bare_text,
        choices=options,
        reference=answer,
    )


def to_item(row: Fields) -> Item:
    """`question`, `options` in any notation, and `answer_idx` or `label`."""
    fields = RowConfig(answer="label" if "label" in row else "answer_idx")
    question, options, answer = FORMATS["choices"](row, fields)
    if not options or answer is None:
        raise ValueError("it has no options")
    assert isinstance(question, str)
    return choice_item(str(row.get("id", row["row"])), question, options, answer[0])


def to_heldout_item(row: Fields) -> Item | None:
    """A packaged question that the embedded runs never train on."""
    if not is_heldout(row["id"], HELDOUT_FRACTION):
        return None
    return to_item({**row, "label": row["answer"]})


_choices = partial(
    Benchmark,
    block="domain",
    rows=to_item,
    score=score,
)
MEDQA = _choices(
    title="MedQA-USMLE",
    hint=(
        "the 4-option test split as JSONL with question, options {A..D} and answer_idx: "
        "`hf download GBaker/MedQA-USMLE-4-options --repo-type dataset`"
    ),
    size=1273,
)
MEDXPERTQA = _choices(
    title="MedXpertQA-Text",
    hint=(
        "the test split of the Text part as JSONL with question, options {A..J} and label: "
        "`hf download TsinghuaC3I/MedXpertQA --repo-type dataset`"
    ),
    size=2450,
)
MEDICAL_HELDOUT = _choices(
    title="Medical questions, held out",
    rows=to_heldout_item,
    packaged="megadistill/data/sets/medical_questions.jsonl",
    hint="`path: packaged` takes the questions that ship with this package",
    size=28,
)
