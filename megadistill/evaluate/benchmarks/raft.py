"""RAFT's D-Acc and MS-Bench: several judges say whether an answer is right, or acceptable; majority.

The papers' questions are not published: D-Acc takes the user's own test questions with answers.
"""

from megadistill.data.files import BadRowError
from megadistill.data.formats import SHAREGPT, parsed, read_chat, split_chat, text_of
from megadistill.evaluate.benchmarks.verified import judged_by
from megadistill.evaluate.protocol import Benchmark, Fields, Item, user
from megadistill.inference.requests import SamplingParams

SYSTEM = "You are a helpful assistant."
"""A first turn that MS-Bench's rows have for nothing."""
FOREIGN = ("moss", "human:", "user:", "assistant:")
"""Marks of rows that are about another model, or several turns in one."""


def d_acc_item(row: Fields) -> Item:
    """`question` and `answer`, or chat `messages` and `answer`, as `megadistill prepare` writes them."""
    if row.get("messages") is None:
        messages = user(text_of(row, "question", "empty_question"))
    else:
        messages, _ = split_chat(row["messages"], "messages", is_open=True)
    return Item(
        id=str(row.get("id", row["row"])),
        messages=messages,
        text=messages[-1]["content"],
        reference=text_of(row, "answer", "empty_answer"),
    )


def ms_bench_item(row: Fields) -> Item | None:
    """The first question and its answer; None for a dialogue that does not begin with them."""
    dialogue = parsed(row[SHAREGPT])
    if not isinstance(dialogue, list):
        raise ValueError(f"{SHAREGPT}: neither JSON nor a Python list")
    try:
        turns, _ = read_chat(dialogue, SHAREGPT)
    except BadRowError:
        return None
    if turns[:1] == [{"role": "system", "content": SYSTEM}]:
        del turns[0]
    texts = [turn["content"] for turn in turns]
    if any(mark in text.lower() for text in texts for mark in FOREIGN):
        return None
    if [turn["role"] for turn in turns[:2]] != ["user", "assistant"]:
        return None
    question, answer = texts[:2]
    if not question.strip() or not answer.strip():
        return None
    return Item(
        id=str(row.get("id", row["row"])), messages=user(question), text=question, reference=answer
    )


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
