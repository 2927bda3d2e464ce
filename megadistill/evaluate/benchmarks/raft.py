"""RAFT's D-Acc and MS-Bench: several judges say whether an answer is right, or acceptable; majority.

The papers' questions are not published: D-Acc takes the user's own test questions with answers.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from megadistill.evaluate.benchmarks.verified import judged_by
from megadistill.evaluate.protocol import Benchmark, Item, user
from megadistill.inference.requests import SamplingParams
from megadistill.types import Message

SYSTEM = "You are a helpful assistant."
"""A first turn that MS-Bench's rows have for nothing."""
FOREIGN = ("moss", "human:", "user:", "assistant:")
"""Marks of rows that are about another model, or several turns in one."""
SPEAKERS = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


def d_acc_item(row: Mapping[str, Any]) -> Item:
    """`question` and `answer`, or chat `messages` and `answer`, as `megadistill prepare` writes them."""
    messages = user(row["question"]) if "messages" not in row else chat(row["messages"])
    if not str(row["answer"]).strip():
        raise ValueError("the answer is empty")
    return Item(
        id=str(row.get("id", row["row"])),
        messages=messages,
        text=messages[-1]["content"],
        reference=str(row["answer"]),
    )


def chat(turns: Sequence[Mapping[str, str]]) -> tuple[Message, ...]:
    """The turns with nothing but role and content."""
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def ms_bench_item(row: Mapping[str, Any]) -> Item | None:
    """The first question and its answer; None for a dialogue that does not begin with them."""
    turns = row["conversations"]
    if isinstance(turns, str):
        turns = _parsed(turns)
    pairs = [(SPEAKERS.get(turn["from"], turn["from"]), str(turn["value"])) for turn in turns]
    if pairs[:1] == [("system", SYSTEM)]:
        del pairs[0]
    texts = [text.lower() for _, text in pairs]
    if any(mark in text for text in texts for mark in FOREIGN):
        return None
    if [speaker for speaker, _ in pairs[:2]] != ["user", "assistant"]:
        return None
    (_, question), (_, answer) = pairs[:2]
    if not question.strip() or not answer.strip():
        return None
    return Item(
        id=str(row.get("id", row["row"])), messages=user(question), text=question, reference=answer
    )


def _parsed(text: str) -> Any:  # whatever the row holds
    """A list that was written as JSON or as Python."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"conversations: neither JSON nor a Python list: {error}") from None


JUDGING = SamplingParams(max_tokens=1024)
D_ACC = Benchmark(
    title="D-Acc",
    block="domain",
    sampling=SamplingParams(max_tokens=1024),
    rows=d_acc_item,
    judged=judged_by("packaged:correct-v1", JUDGING),
    hint="your test questions as JSONL with question and answer, or messages and answer",
)
MS_BENCH = Benchmark(
    title="MS-Bench",
    block="general",
    sampling=SamplingParams(max_tokens=1024),
    rows=ms_bench_item,
    judged=judged_by("packaged:acceptable-v1", JUDGING),
    draws=200,
    hint=(
        "ModelScope's data set iic/ms_bench as .jsonl, .csv or .parquet: `modelscope download "
        "--dataset iic/ms_bench`"
    ),
    size=200,
)
