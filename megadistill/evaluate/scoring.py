"""Scores of one system's answers to a benchmark, by rules or by another model."""

import asyncio
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megadistill.evaluate.benchmarks import get_benchmark
from megadistill.evaluate.generating import ItemsArguments
from megadistill.evaluate.protocol import Benchmark, Item, Judged, Score, Tools
from megadistill.evaluate.sandbox import Mode
from megadistill.inference.chat import ChatError, ChatModel, Usage, run_each
from megadistill.inference.model_argument import ModelArgument
from megadistill.inference.requests import ChatRequest, without_thinking
from megadistill.inference.serving import open_models
from megadistill.launch.shards import FAILED, Runtime, Upstream
from megadistill.refine.blocks import KEY, Blocks, Row, RowNamer, read_blocks

log = logging.getLogger(__name__)

COLUMNS = {
    "item": "string",
    "sample": "int64",
    "group": "string",
    "hole": "string",
    "value": "float64",
    "weight": "float64",
    "extracted": "string",
    "details": "string",
    "replies": "string",
    "messages": "string",
    "written": "string",
    "num_tokens": "int64",
    "finish_reason": "string",
}
"""A transcript with its score: `details` and the judge's `replies` as JSON. `hole` says why there is
no score: the answer's `finish_reason` where there is no answer, or what is wrong with the verdict."""
ANSWERED = ("stop", "length")
UNREADABLE = "verdict_unreadable"
SCORES = "scores.parquet"
"""All rows of a finished shard."""


class ScoreArguments(ItemsArguments):
    """A system's answers to a benchmark, and who judges them."""

    answers: Upstream
    judges: tuple[ModelArgument, ...]
    checkout: Runtime[Path]
    tools: str | None
    """Hash of the benchmark's own code, which lies in `checkout`."""
    sandbox: Runtime[Mode]


def score(directory: Path, arguments: ScoreArguments) -> None:
    """The shard: scores what its directory lacks, then joins its blocks to one file."""
    if (directory / SCORES).exists() and not (directory / FAILED).exists():
        return
    benchmark = get_benchmark(arguments.kind)
    items = {item.id: item for item in arguments.read()}
    answers = read_blocks(arguments.answers.outputs)
    key_of = RowNamer(arguments)
    labels = [{KEY: key_of(asdict(items[row["item"]]), row)} for row in answers]
    blocks = Blocks(directory, COLUMNS, labels, size=arguments.block)
    for position in blocks.missing():
        answer = answers[position]
        if (reason := answer["finish_reason"]) not in ANSWERED:
            found = Score(value=0.0, weight=0.0, hole=reason)
            row = to_row(items[answer["item"]], answer, found)
            blocks.add(position, row, failed=answer[KEY] is None)
    if arguments.judges and benchmark.judged is not None:
        by_judges(benchmark, benchmark.judged, arguments, items, answers, blocks)
    else:
        tools = Tools(checkout=arguments.checkout, sandbox=arguments.sandbox)
        by_rules(benchmark, tools, items, answers, blocks)
    blocks.join(SCORES)


def by_judges(
    benchmark: Benchmark,
    judged: Judged,
    arguments: ScoreArguments,
    items: Mapping[str, Item],
    answers: Sequence[Row],
    blocks: Blocks,
) -> None:
    """With other models."""
    models = {model.name: model.config for model in arguments.judges}
    with open_models(models, gpu=arguments.gpu, logs=blocks.directory) as chats:
        judges = [Judge(judged, model) for model in chats.values()]

        async def judge(position: int) -> None:
            """One answer by all judges."""
            answer = answers[position]
            item, text = items[answer["item"]], visible(benchmark, answer["written"])
            given = await asyncio.gather(*(one.replies(item, text) for one in judges))
            scores = [judged_score(judged, item, text, replies) for replies in given]
            replies = [reply for some in given for reply in some]
            row = to_row(item, answer, majority(scores), [reply.text for reply in replies])
            blocks.add(position, row, failed=any(reply.failure for reply in replies))

        run_each(judge, blocks.missing(), chats.values())
    for name, one in zip(models, judges, strict=True):
        log.info("scoring: %s: %s", name, one.usage)


def by_rules(
    benchmark: Benchmark,
    tools: Tools,
    items: Mapping[str, Item],
    answers: Sequence[Row],
    blocks: Blocks,
) -> None:
    """Without another model; where programs run, as many at a time as there are processors."""
    positions = blocks.missing()

    def row_at(position: int) -> Row:
        answer = answers[position]
        item, text = items[answer["item"]], visible(benchmark, answer["written"])
        if benchmark.run is not None:
            return to_row(item, answer, benchmark.run(item, text, tools))
        assert benchmark.score is not None
        return to_row(item, answer, benchmark.score(item, text))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        # Rules stay in this thread: math-verify limits its time by signals.
        rows = map(row_at, positions) if benchmark.run is None else pool.map(row_at, positions)
        for position, row in zip(positions, rows, strict=True):
            blocks.add(position, row)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a judge said."""

    text: str
    failure: str | None = None
    """Why it is no verdict."""


def judged_score(judged: Judged, item: Item, text: str, replies: Sequence[Reply]) -> Score:
    """By one judge's replies; a hole where one of them is no verdict."""
    found = judged.score_replies(item, text, [reply.text for reply in replies])
    failures = [reply.failure for reply in replies if reply.failure]
    return replace(found, hole=failures[0]) if failures else found


def majority(scores: Sequence[Score]) -> Score:
    """One judge's score; of several, whether more than half say right.

    Who gives no verdict says no, and leaves a hole where a yes would turn the majority.
    """
    if len(scores) == 1:
        return scores[0]
    details: Counter[str] = Counter()
    for score in scores:
        details.update(score.details)
    share = sum(score.value for score in scores) / len(scores)
    holes = [score.hole for score in scores if score.hole]
    turns = share <= 0.5 < share + len(holes) / len(scores)
    return Score(
        value=float(share > 0.5),
        hole=holes[0] if turns else None,
        extracted=scores[0].extracted,
        details={**details, "share_of_judges": share, "unanimous": float(share in (0.0, 1.0))},
    )


class Judge:
    """One judge of many answers; the same question is asked once."""

    def __init__(self, judged: Judged, model: ChatModel) -> None:
        self.usage = Usage()
        self._judged = judged
        self._judge = model
        self._replies: dict[str, asyncio.Future[Reply]] = {}

    async def replies(self, item: Item, text: str) -> Sequence[Reply]:
        """To every question that an answer raises."""
        requests = self._judged.requests(item, text)
        return await asyncio.gather(*(self._reply(request) for request in requests))

    async def _reply(self, request: ChatRequest) -> Reply:
        key = json.dumps(asdict(request))
        if key not in self._replies:
            self._replies[key] = asyncio.ensure_future(self._ask(request))
        return await self._replies[key]

    async def _ask(self, request: ChatRequest) -> Reply:
        """A reply that can be read, or the second of two that cannot; empty when there is none."""
        tries = [replace(request, seed=number) for number in range(2)]
        try:
            text = await self._judge.ask_until_parsed(tries, self._judged.parse, self.usage)
        except ChatError as error:
            log.warning("scoring: %s", error)
            return Reply("", f"judge_{error}")
        return Reply(text, UNREADABLE if self._judged.parse(text) is None else None)


def visible(benchmark: Benchmark, written: str) -> str:
    """The part of an answer that is scored."""
    return without_thinking(written) if benchmark.strip_thinking else written


def to_row(item: Item, answer: Row, found: Score, replies: Sequence[str] = ()) -> Row:
    """The transcript with its score."""
    return {
        **answer,
        "messages": json.dumps(item.messages, ensure_ascii=False),
        "group": item.group,
        "hole": found.hole,
        "value": found.value,
        "weight": found.weight,
        "extracted": found.extracted,
        "details": json.dumps(dict(found.details)),
        "replies": json.dumps(list(replies), ensure_ascii=False) if replies else None,
    }
