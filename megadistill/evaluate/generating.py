"""Answers of one system to one share of a benchmark: through vLLM in the shard, or an endpoint."""

import datetime
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megadistill.config.refine import EndpointConfig, ServedConfig
from megadistill.data.tokenizer import (
    UnreadableTextError,
    answer_opening,
    chat_ids,
    load_tokenizer,
)
from megadistill.evaluate.benchmarks import get_benchmark, read_items
from megadistill.evaluate.protocol import Item, MultiTurn
from megadistill.inference.chat import (
    MOST_ALIVE,
    ChatError,
    ChatModel,
    Usage,
    open_endpoint,
    run_each,
)
from megadistill.inference.engine import start_batch_engine
from megadistill.inference.model_argument import ModelArgument
from megadistill.inference.requests import BatchRequest, ChatRequest, SamplingParams, open_thought
from megadistill.inference.serving import open_models
from megadistill.launch.shards import KnownFile, Runtime, ShardArguments
from megadistill.refine.blocks import KEY, Blocks, Row, RowNamer, part_of
from megadistill.resolve import resolve
from megadistill.rollout.seeds import seed_for
from megadistill.rollout.vllm_arguments import EngineSettings

log = logging.getLogger(__name__)

SCENES = 16
"""Under way at the same time; each waits for one line at a time."""


COLUMNS = {
    "item": "string",
    "sample": "int64",
    "written": "string",
    "num_tokens": "int64",
    "finish_reason": "string",
}
"""`finish_reason` is stop, length, or why there is no answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """A sample of the answers to an item."""

    item: Item
    sample: int
    seed: int


class ItemsArguments(ShardArguments):
    """The items of a benchmark."""

    benchmark: str
    """Its name in the configuration."""
    kind: str
    """Of its protocol."""
    items: KnownFile
    limit: int | None
    block: int
    gpu: Runtime[bool]

    def read(self) -> list[Item]:
        """The items as the configuration limits them."""
        return list(read_items(self.kind, str(self.items.path)))[: self.limit]


class GenerateArguments(ItemsArguments):
    """A part of them for a system to answer."""

    system: str
    model: ModelArgument
    director: ModelArgument | None
    """The judge's model, where answers take several turns."""
    sampling: SamplingParams
    date: datetime.date | None
    """Of chat templates."""
    seed: int
    part: int
    of: int

    def draws(self) -> list[Draw]:
        """The samples of this part, by position."""
        return [
            Draw(item=item, sample=sample, seed=seed_for(self.seed, sample, item.id))
            for item in part_of(self.read(), self.part, self.of)
            for sample in range(self.sampling.samples)
        ]


def generate(directory: Path, arguments: GenerateArguments) -> None:
    """The shard: answers what its directory lacks."""
    draws, key_of = arguments.draws(), RowNamer(arguments)
    labels = [
        {"item": d.item.id, "sample": d.sample, KEY: key_of(d.item.id, d.item.messages, d.sample)}
        for d in draws
    ]
    blocks = Blocks(directory, COLUMNS, labels, size=arguments.block)
    if not blocks.missing():
        return
    multi_turn = get_benchmark(arguments.kind).multi_turn
    model = arguments.model.config
    if multi_turn is not None:
        assert arguments.director is not None
        models = {"actor": model, "director": arguments.director.config}
        with open_models(models, gpu=arguments.gpu, logs=directory) as chats:
            play_all(multi_turn, list(chats.values()), draws, blocks)
    elif isinstance(model, EndpointConfig):
        ask_all(open_endpoint(arguments.model.name, model), arguments.sampling, draws, blocks)
    else:
        write_all(arguments, model, draws, blocks)


def write_all(
    arguments: GenerateArguments, model: ServedConfig, draws: Sequence[Draw], blocks: Blocks
) -> None:
    """Through the bulk engine. A prompt that leaves no room for an answer has none."""
    path = resolve("model", model.path)
    tokenizer = load_tokenizer(path)
    thinking = model.extra_body.get("chat_template_kwargs", {}).get("enable_thinking")
    opening = answer_opening(tokenizer, thinking)
    engine = start_batch_engine(EngineSettings.of(model, gpu=arguments.gpu))

    def requests() -> Iterator[BatchRequest]:
        for position in blocks.missing():
            draw = draws[position]
            try:
                token_ids = chat_ids(draw.item.messages, tokenizer, thinking, arguments.date)
                problem = "prompt_too_long" if len(token_ids) >= model.max_model_len else None
            except UnreadableTextError as error:
                problem = str(error)
            if problem is None:
                yield BatchRequest(key=position, token_ids=token_ids, seed=draw.seed)
            else:
                blocks.add(position, answer_row("", problem, 0))

    most = min(arguments.sampling.max_tokens, model.max_model_len)
    sampling = replace(arguments.sampling, max_tokens=most)
    for response in engine.generate(requests(), sampling):
        text = str(tokenizer.decode(list(response.token_ids), skip_special_tokens=True))
        text = open_thought(opening, text)
        row = answer_row(text, response.finish_reason, len(response.token_ids))
        if blocks.add(response.key, row):
            log.info("generating: a block of answers is saved")
    engine.close()


def ask_all(
    chat: ChatModel, sampling: SamplingParams, draws: Sequence[Draw], blocks: Blocks
) -> None:
    """Through an endpoint, as many at a time as it takes."""

    async def answer(draw: Draw, usage: Usage) -> Row:
        request = ChatRequest(messages=draw.item.messages, sampling=sampling, seed=draw.seed)
        response = await chat.ask(request, usage)
        return answer_row(response.text, "length" if response.cut else "stop")

    fill(blocks, draws, answer, [chat])


def play_all(
    multi_turn: MultiTurn, models: Sequence[ChatModel], draws: Sequence[Draw], blocks: Blocks
) -> None:
    """Answers that take several turns between the system and the judge's model."""

    async def answer(draw: Draw, usage: Usage) -> Row:
        actor, director = (
            partial(
                one.ask_until_parsed, parse=lambda text: text or None, usage=usage, give_up=False
            )
            for one in models
        )
        return answer_row(await multi_turn(draw.item, actor, director), "stop")

    fill(blocks, draws, answer, models, SCENES)


def fill(
    blocks: Blocks,
    draws: Sequence[Draw],
    answer: Callable[[Draw, Usage], Awaitable[Row]],
    models: Sequence[ChatModel],
    most: int = MOST_ALIVE,
) -> None:
    """Have each draw answered, `most` under way; one that fails has no answer."""
    usage = Usage()

    async def fill_one(position: int) -> None:
        try:
            row = await answer(draws[position], usage)
        except ChatError as error:
            blocks.add(position, answer_row("", str(error)), failed=True)
        else:
            blocks.add(position, row)

    run_each(fill_one, blocks.missing(), models, most)
    log.info("generating: %s", usage)


def answer_row(written: str, finish_reason: str, num_tokens: int | None = None) -> Row:
    """An answer, but for what its label says."""
    return {"written": written, "num_tokens": num_tokens, "finish_reason": finish_reason}
