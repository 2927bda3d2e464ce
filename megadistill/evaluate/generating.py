"""Answers of one system to one share of a benchmark: through vLLM in the shard, or an endpoint."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megadistill.config.refine import ChatModelConfig, EndpointConfig, ServedConfig
from megadistill.data.tokenizer import chat_ids, load_tokenizer
from megadistill.evaluate.benchmarks import get_benchmark, read_items
from megadistill.evaluate.protocol import Item, MultiTurn
from megadistill.evaluate.sample_grid import COLUMNS, SampleGrid
from megadistill.inference.chat import ChatError, ChatModel, Usage, open_endpoint, run_each
from megadistill.inference.engine import start_batch_engine
from megadistill.inference.requests import BatchRequest, ChatRequest, SamplingParams
from megadistill.inference.serving import open_models
from megadistill.refine.blocks import Blocks
from megadistill.refine.stages import Stage, part_of
from megadistill.resolve import resolve
from megadistill.rollout.vllm_arguments import EngineSettings

log = logging.getLogger(__name__)

_MODEL: TypeAdapter[ChatModelConfig] = TypeAdapter(ChatModelConfig)
_SAMPLING: TypeAdapter[SamplingParams] = TypeAdapter(SamplingParams)
SCENES = 16
"""Under way at the same time; each waits for one line at a time."""


def generate(directory: Path, arguments: Mapping[str, Any]) -> None:
    """The shard: answers what its directory lacks. See `pipeline` for the arguments."""
    stage = Stage.of(directory)
    runtime = stage.runtime
    settings = runtime["benchmarks"][arguments["benchmark"]]
    benchmark = get_benchmark(settings["kind"])
    grid = SampleGrid(
        part_of(read_share(settings), arguments["part"], arguments["of"]),
        _SAMPLING.validate_python(arguments["draw"]),
        arguments["seed"],
    )
    blocks = Blocks(directory, COLUMNS, total=len(grid), size=arguments["block"])
    if not (missing := blocks.missing()):
        return
    model = _MODEL.validate_python(runtime["systems"][arguments["system"]])
    begun = time.monotonic()
    if benchmark.multi_turn is not None:
        director = _MODEL.validate_python(runtime["models"][settings["judges"][0]])
        models = {"actor": model, "director": director}
        with open_models(models, gpu=runtime["gpu"], logs=directory) as chats:
            run_scenes(benchmark.multi_turn, list(chats.values()), grid, blocks)
    elif isinstance(model, EndpointConfig):
        ask_all(open_endpoint(arguments["system"], model), grid, blocks)
    else:
        write_all(model, grid, blocks, gpu=runtime["gpu"])
    seconds = time.monotonic() - begun
    stage.note_figures(directory, {"answers": len(missing), "seconds": seconds})


def read_share(settings: Mapping[str, Any]) -> list[Item]:
    """The items of a benchmark as the configuration limits them."""
    items = read_items(settings["kind"], settings["path"])
    return list(items)[: settings["limit"]]


def write_all(model: ServedConfig, grid: SampleGrid, blocks: Blocks, *, gpu: bool) -> None:
    """Through the bulk engine. A prompt that leaves no room for an answer has none."""
    path = resolve("model", model.path)
    tokenizer = load_tokenizer(path)
    thinking = model.extra_body.get("chat_template_kwargs", {}).get("enable_thinking")
    engine = start_batch_engine(EngineSettings.of(model, gpu=gpu))

    def requests() -> Iterator[BatchRequest]:
        for position in blocks.missing():
            item, _ = grid.at(position)
            token_ids = chat_ids(item.messages, tokenizer, thinking)
            if len(token_ids) >= model.max_model_len:
                blocks.add(position, grid.row(position, "", "prompt_too_long", 0))
                continue
            yield BatchRequest(key=position, token_ids=token_ids, seed=grid.seed_at(position))

    most = min(grid.sampling.max_tokens, model.max_model_len)
    sampling = replace(grid.sampling, max_tokens=most)
    for response in engine.generate(requests(), sampling):
        text = str(tokenizer.decode(list(response.token_ids), skip_special_tokens=True))
        row = grid.row(response.key, text, response.finish_reason, len(response.token_ids))
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
            written, reason = response.text, "length" if response.cut else "stop"
        except ChatError as error:
            written, reason = "", str(error)
        blocks.add(position, grid.row(position, written, reason))

    run_each(ask, blocks.missing(), [chat])
    log.info("generating: %s", usage)


def run_scenes(
    multi_turn: MultiTurn, models: Sequence[ChatModel], grid: SampleGrid, blocks: Blocks
) -> None:
    """Answers that take several turns between the system and the judge's model."""
    usage = Usage()
    actor, director = (
        partial(model.ask_until_parsed, parse=lambda text: text or None, usage=usage)
        for model in models
    )

    async def run_scene(position: int) -> None:
        item, _ = grid.at(position)
        try:
            written, reason = await multi_turn(item, actor, director), "stop"
        except ChatError as error:  # without an answer when it broke off
            written, reason = "", str(error)
        blocks.add(position, grid.row(position, written, reason))

    run_each(run_scene, blocks.missing(), models, SCENES)
    log.info("scenes: %s", usage)
