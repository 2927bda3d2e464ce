"""Answers of one system to one share of a benchmark: through vLLM in the shard, or an endpoint."""

import datetime
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
from megadistill.evaluate.sample_grid import COLUMNS, SampleGrid, answer_row
from megadistill.inference.chat import ChatError, ChatModel, Usage, open_endpoint, run_each
from megadistill.inference.engine import start_batch_engine
from megadistill.inference.model_argument import ModelArgument
from megadistill.inference.requests import BatchRequest, ChatRequest, SamplingParams, open_thought
from megadistill.inference.serving import open_models
from megadistill.launch.shards import KnownFile, Runtime, ShardArguments
from megadistill.refine.blocks import Blocks, RowNamer, part_of
from megadistill.resolve import resolve
from megadistill.rollout.vllm_arguments import EngineSettings

log = logging.getLogger(__name__)

SCENES = 16
"""Under way at the same time; each waits for one line at a time."""


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


def generate(directory: Path, arguments: GenerateArguments) -> None:
    """The shard: answers what its directory lacks."""
    multi_turn = get_benchmark(arguments.kind).multi_turn
    items = part_of(arguments.read(), arguments.part, arguments.of)
    grid = SampleGrid(items, arguments.sampling, arguments.seed)
    blocks = Blocks(directory, COLUMNS, grid.labels(RowNamer(arguments)), size=arguments.block)
    if not blocks.missing():
        return
    model = arguments.model.config
    if multi_turn is not None:
        assert arguments.director is not None
        models = {"actor": model, "director": arguments.director.config}
        with open_models(models, gpu=arguments.gpu, logs=directory) as chats:
            run_scenes(multi_turn, list(chats.values()), grid, blocks)
    elif isinstance(model, EndpointConfig):
        ask_all(open_endpoint(arguments.model.name, model), grid, blocks)
    else:
        write_all(model, grid, blocks, arguments)


def write_all(
    model: ServedConfig, grid: SampleGrid, blocks: Blocks, arguments: GenerateArguments
) -> None:
    """Through the bulk engine. A prompt that leaves no room for an answer has none."""
    path = resolve("model", model.path)
    tokenizer = load_tokenizer(path)
    thinking = model.extra_body.get("chat_template_kwargs", {}).get("enable_thinking")
    opening = answer_opening(tokenizer, thinking)
    engine = start_batch_engine(EngineSettings.of(model, gpu=arguments.gpu))

    def requests() -> Iterator[BatchRequest]:
        for position in blocks.missing():
            item, _ = grid.at(position)
            try:
                token_ids = chat_ids(item.messages, tokenizer, thinking, arguments.date)
            except UnreadableTextError as error:
                blocks.add(position, answer_row("", str(error), 0))
                continue
            if len(token_ids) >= model.max_model_len:
                blocks.add(position, answer_row("", "prompt_too_long", 0))
                continue
            yield BatchRequest(key=position, token_ids=token_ids, seed=grid.seed_at(position))

    most = min(grid.sampling.max_tokens, model.max_model_len)
    sampling = replace(grid.sampling, max_tokens=most)
    for response in engine.generate(requests(), sampling):
        text = str(tokenizer.decode(list(response.token_ids), skip_special_tokens=True))
        text = open_thought(opening, text)
        row = answer_row(text, response.finish_reason, len(response.token_ids))
        if blocks.add(response.key, row):
            log.info("generating: a block of answers is saved")
    engine.close()


def ask_all(chat: ChatModel, grid: SampleGrid, blocks: Blocks) -> None:
    """Through an endpoint, as many at a time as it takes."""
    usage = Usage()

    async def ask(position: int) -> None:
        item, _ = grid.at(position)
        request = ChatRequest(
            messages=item.messages, sampling=grid.sampling, seed=grid.seed_at(position)
        )
        try:
            response = await chat.ask(request, usage)
        except ChatError as error:
            blocks.add(position, answer_row("", str(error)), failed=True)
        else:
            reason = "length" if response.cut else "stop"
            blocks.add(position, answer_row(response.text, reason))

    run_each(ask, blocks.missing(), [chat])
    log.info("generating: %s", usage)


def run_scenes(
    multi_turn: MultiTurn, models: Sequence[ChatModel], grid: SampleGrid, blocks: Blocks
) -> None:
    """Answers that take several turns between the system and the judge's model."""
    usage = Usage()
    actor, director = (
        partial(model.ask_until_parsed, parse=lambda text: text or None, usage=usage, give_up=False)
        for model in models
    )

    async def run_scene(position: int) -> None:
        item, _ = grid.at(position)
        try:
            written = await multi_turn(item, actor, director)
        except ChatError as error:  # without an answer when it broke off
            blocks.add(position, answer_row("", str(error)), failed=True)
        else:
            blocks.add(position, answer_row(written, "stop"))

    run_each(run_scene, blocks.missing(), models, SCENES)
    log.info("scenes: %s", usage)
