"""Sixty ways to end an answer, and what counts as its letter."""

import json
from pathlib import Path

import pytest

from megadistill.config import RunConfig, load
from megadistill.data.pools import is_heldout
from megadistill.data.sources import read_pool
from megadistill.evaluate.benchmarks import get_benchmark, read_items
from megadistill.evaluate.benchmarks.medical import score
from megadistill.evaluate.letters import final_letter

STYLES: list[tuple[str, str | None]] = [
    ("Final answer: A", "A"),
    ("Final answer: B.", "B"),
    ("Final answer: (C)", "C"),
    ("Final answer: D)", "D"),
    ("Final answer: **A**", "A"),
    ("**Final answer: B**", "B"),
    ("**Final answer:** C", "C"),
    ("Final answer: **(D)**", "D"),
    ("final answer: A", "A"),
    ("FINAL ANSWER: B", "B"),
    ("Final Answer: C", "C"),
    ("Final answer:D", "D"),
    ("Final answer:\nA", "A"),
    ("Final answer:\n\n**B**", "B"),
    ("Final answer:   C", "C"),
    ("Final answer: D. Digoxin", "D"),
    ("Final answer: A: aspirin", "A"),
    ("Final answer: B - because", "B"),
    ("Final answer: (C) Statin", "C"),
    ("**Final answer**: (D) Digoxin", "D"),
    ("Final answer: A\nFinal answer: B", "B"),
    ("First I thought Final answer: C. No. Final answer: D", "D"),
    ("Final answer: E", "E"),
    ("Final answer: J", "J"),
    ("Final answer: I", "I"),
    ("Reasoning...\n\nFinal answer: F\n", "F"),
    ("## Final answer: G", "G"),
    ("> Final answer: H", "H"),
    ("Final answer: a statin", None),
    ("Final answer: B<|im_end|>", "B"),
    ("\\boxed{A}", "A"),
    ("$\\boxed{B}$", "B"),
    ("\\boxed{\\text{C}}", "C"),
    ("\\boxed{ D }", "D"),
    ("\\boxed{\\text{A. aspirin}}", "A"),
    ("\\boxed{B. beta blocker}", "B"),
    ("so \\boxed{A}, no, \\boxed{C}", "C"),
    ("\\boxed{A} Final answer: B", "B"),
    ("Final answer: \\boxed{D}", "D"),
    ("Final answer: $\\boxed{A}$", "A"),
    ("**Final answer:** **(A)**", "A"),
    ("Final answer: Z", None),
    ("Final answer: none of these", None),
    ("Final answer: Aspirin", None),
    ("Final answer: Both A and B", None),
    ("Final answer: 1", None),
    ("Final answer is A", "A"),
    ("The answer is B", None),
    ("Answer: C", None),
    ("D", None),
    ("A. aspirin", None),
    ("", None),
    ("I cannot answer this.", None),
    ("Final answer:", None),
    ("Final answer - A", None),
    ("\\boxed{}", None),
    ("\\boxed{42}", None),
    ("**Final answer:** none", None),
    ("Final ans: B", None),
    ("The final answer: C", "C"),
]


def test_there_are_sixty() -> None:
    assert len({style for style, _ in STYLES}) == 60


@pytest.mark.parametrize(("answer", "letter"), STYLES)
def test_the_letter_is_found(answer: str, letter: str | None) -> None:
    assert final_letter(answer) == letter


DRUGS = {"A": "a 45-year-old man", "B": "Left hemisection", "C": "aspirin", "D": "Rest"}
MICROBES = dict(
    zip("ABCDE", ["Amoeba", "Bacillus", "Candida", "E. coli", "Echovirus"], strict=True)
)


@pytest.mark.parametrize(
    ("answer", "choices", "letter"),
    [
        ("\\boxed{Aspirin}", DRUGS, None),
        ("\\boxed{(D)}", DRUGS, "D"),
        ("\\boxed{\\textbf{B}}", DRUGS, "B"),
        ("Final answer: [B]", DRUGS, "B"),
        ("Final answer: $B$", DRUGS, "B"),
        ("Final answer: `B`", DRUGS, "B"),
        ("Final answer\uff1aB", DRUGS, "B"),
        ("Final answer is B", DRUGS, "B"),
        ("The final answer is: **B**", DRUGS, "B"),
        ("Final answer: I think it is C", DRUGS, "C"),
        ("Final answer: the correct option is C", DRUGS, "C"),
        ("Final answer: C because it thins the blood", DRUGS, "C"),
        ("Final answer: A 45-year-old woman", DRUGS, None),
        ("Final answer: A a 45-year-old man", DRUGS, "A"),
        ("Final answer: I am not sure", dict.fromkeys("ABCDEFGHI", "x"), None),
        ("Final answer: E. coli", DRUGS, None),  # there is no E
        ("Final answer: E. coli", MICROBES, None),  # E is another one
        ("Final answer: E. Echovirus", MICROBES, "E"),
        ("Final answer: B. left hemisection", DRUGS, "B"),
        ("Final answer: A's father", DRUGS, None),
        ("Final answer: both", DRUGS, None),
    ],
)
def test_only_a_letter_of_the_item_is_one_and_no_word(
    answer: str, choices: dict[str, str], letter: str | None
) -> None:
    assert final_letter(answer, choices) == letter


ROW = {"question": "Which?", "options": {"A": "a", "B": "b"}, "answer_idx": "B"}


def test_a_question_is_asked_as_the_protocol_says(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW))
    (item,) = read_items("medqa", str(tmp_path / "a.jsonl"))
    lines = item.messages[0]["content"].splitlines()
    assert lines[:3] == ["Which?", "A. a", "B. b"]
    assert lines[-1].endswith("end with a line `Final answer: <letter>`.")
    assert score(item, "Final answer: B").value == 1.0
    assert score(item, "so B").details == {"no_answer": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_idx": "C"}, "row 1 has the answer 'C', which is none of the options A, B"),
        ({"options": {"A": "a", "C": "c"}}, "row 1 has options with the letters 'AC'"),
        ({"options": None}, "row 1: it has no options"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW | change))
    with pytest.raises(ValueError, match=message):
        list(read_items("medqa", str(tmp_path / "a.jsonl")))
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": "q"}))
    with pytest.raises(ValueError, match="row 1 has no field 'answer_idx'"):
        list(read_items("medqa", str(tmp_path / "b.jsonl")))


def test_the_held_out_questions_are_those_that_the_embedded_runs_do_not_train_on() -> None:
    configs = Path(__file__).parents[2] / "configs" / "embedded"
    data = load(RunConfig, configs / "camopd_medical.yaml").data
    never_trained_on = {
        record.id
        for record in read_pool(data.pools["medical"])
        if is_heldout(record.id, data.heldout_fraction)
    }
    items = list(read_items("medical_heldout", "packaged"))
    assert {item.id for item in items} == never_trained_on
    assert len(items) == get_benchmark("medical_heldout").size
    assert {item.reference for item in items} == {"A", "B", "C", "D"}
