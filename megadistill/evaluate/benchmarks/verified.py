"""GPQA-Diamond and HMMT February 2025: a verifier model compares the final answer with the truth.

HMMT's answers are first compared by math-verify, and the verifier is asked where that finds them
unequal; without a verifier math-verify (for GPQA the letter) decides alone.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from megadistill.evaluate.benchmarks import medical
from megadistill.evaluate.protocol import Benchmark, Fields, Item, Judged, Score, user
from megadistill.inference.requests import ChatRequest, SamplingParams
from megadistill.inference.templates import load_template

FIELDS = ("prompt", "response", "reference")
_DECISION = re.compile(r"<decision>[\s*_`\"']*(yes|no)[\s*_`\"'.!]*</decision>", re.IGNORECASE)
_EXTRACTED = re.compile(r"<extracted_answer>(.*?)</extracted_answer>", re.DOTALL | re.IGNORECASE)
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


def decision(reply: str) -> bool | None:
    """The last decision of a verifier; None where there is none."""
    found = _DECISION.findall(reply)
    return found[-1].lower() == "yes" if found else None


def score_replies(item: Item, answer: str, replies: Sequence[str]) -> Score:
    """Right where the verifier says yes; a reply without a decision counts as no."""
    found = _EXTRACTED.findall(replies[-1])
    extracted = found[-1].strip() if found else None
    return Score(value=float(decision(replies[-1]) is True), extracted=extracted)


def judged_by(template: str, sampling: SamplingParams) -> Judged:
    """By yes or no to one question, which a template makes of prompt, response and reference."""

    def requests(item: Item, answer: str) -> Sequence[ChatRequest]:
        values = {
            "prompt": item.messages[-1]["content"],
            "response": answer,
            "reference": str(item.reference),
        }
        messages = load_template(template, FIELDS).fill(values)
        return [ChatRequest(messages=messages, sampling=sampling)]

    return Judged(requests=requests, parse=decision, score_replies=score_replies, votes=True)


VERIFIER = judged_by("packaged:verifier-v1", SamplingParams(temperature=0.2, max_tokens=512))
"""At the paper's temperature."""


def by_mathematics(item: Item, answer: str) -> Score:
    """HMMT without a verifier."""
    from math_verify import parse, verify  # noqa: PLC0415 - optional, slow to import

    truth = parse(f"\\boxed{{{item.reference}}}")
    found = parse(answer)
    right = bool(found) and verify(truth, found)
    return Score(
        value=float(right),
        extracted=str(found[-1]) if found else None,
        details={"no_answer": float(not found)},
    )


def hmmt_requests(item: Item, answer: str) -> Sequence[ChatRequest]:
    """Nothing where the answers are equal already."""
    return [] if by_mathematics(item, answer).value else VERIFIER.requests(item, answer)


def hmmt_score_replies(item: Item, answer: str, replies: Sequence[str]) -> Score:
    """By the verifier where it was asked."""
    return score_replies(item, answer, replies) if replies else by_mathematics(item, answer)


def gpqa_item(row: Fields) -> Item:
    """A row of the official CSV; the options are shuffled by the row's own name."""
    question = row["Question"].strip()
    right = row["Correct Answer"].strip()
    options = [right, *(row[f"Incorrect Answer {number}"].strip() for number in (1, 2, 3))]
    order = list(range(4))
    name = str(row.get("Record ID") or row["row"])
    random.Random(f"gpqa/{name}").shuffle(order)
    choices = {letter: options[at] for letter, at in zip("ABCD", order, strict=True)}
    item = medical.choice_item(name, question, choices, "ABCD"[order.index(0)])
    return replace(item, text="\n".join([question, *options]))


def hmmt_item(row: Fields) -> Item:
    """`problem` and `answer`, as MathArena has them."""
    name = str(row.get("problem_idx", row["row"]))
    messages = user(f"{row['problem']}\n\n{BOXED}")
    return Item(id=name, messages=messages, text=row["problem"], reference=str(row["answer"]))


GPQA_DIAMOND = Benchmark(
    title="GPQA-Diamond",
    sampling=SamplingParams(
        samples=4, temperature=0.7, top_p=0.95, top_k=20, repetition_penalty=1.05, max_tokens=32768
    ),
    rows=gpqa_item,
    score=medical.score,
    judged=VERIFIER,
    hint=(
        "gpqa_diamond.csv of the gated data set Idavidrein/gpqa: accept its terms on the hub, then "
        "`hf download Idavidrein/gpqa gpqa_diamond.csv --repo-type dataset`"
    ),
    size=198,
)
HMMT25 = Benchmark(
    title="HMMT25",
    sampling=SamplingParams(
        samples=16, temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.05, max_tokens=32768
    ),
    rows=hmmt_item,
    score=by_mathematics,
    judged=replace(VERIFIER, requests=hmmt_requests, score_replies=hmmt_score_replies),
    hint="`hf download MathArena/hmmt_feb_2025 --repo-type dataset`",
    size=30,
)
