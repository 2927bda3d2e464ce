"""Answers of one system to one share of a benchmark: through vLLM in the shard, or an endpoint."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megadistill.config.refine import ChatModelConfig, EndpointConfig, ServedConfig
from megadistill.data.tokenizer import chat_ids, load_tokenizer
from megadistill.evaluate.benchmarks import get_benchmark, read_items
from megadistill.evaluate.multi_turn import run_scenes
from megadistill.evaluate.protocol import Item
from megadistill.evaluate.sample_grid import COLUMNS, SampleGrid
from megadistill.inference.chat import ChatError, ChatModel, Usage, open_endpoint, run_calls
from megadistill.inference.engine import start_batch_engine
from megadistill.inference.requests import BatchRequest, ChatRequest, SamplingParams
from megadistill.refine.blocks import Blocks
from megadistill.refine.stages import Stage, part_of
from megadistill.resolve import resolve
from megadistill.rollout.vllm_arguments import EngineSettings

log = logging.getLogger(__name__)

_MODEL: TypeAdapter[ChatModelConfig] = TypeAdapter(ChatModelConfig)
_SAMPLING: TypeAdapter[SamplingParams] = TypeAdapter(SamplingParams)
Add = Callable[[int, Mapping[str, Any]], bool]


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
    positions = blocks.missing()
    if not positions:
        return
    model = _MODEL.validate_python(runtime["systems"][arguments["system"]])
    begun = time.monotonic()
    if benchmark.multi_turn is not None:
        names = (arguments["system"], settings["judges"][0])
        run_scenes(benchmark.multi_turn, runtime, names, grid, blocks, directory)
    elif isinstance(model, EndpointConfig):
        ask_all(open_endpoint(arguments["system"], model), grid, positions, blocks.add)
    else:
        write_all(model, grid, positions, blocks.add, gpu=runtime["gpu"])
    seconds = time.monotonic() - begun
    stage.note_figures(directory, {"answers": len(positions), "seconds": seconds})


def read_share(settings: Mapping[str, Any]) -> list[Item]:
    """The items of a benchmark as the configuration limits them."""
    items = read_items(settings["kind"], settings["path"])
    return list(items)[: settings["limit"]]


def write_all(
    model: ServedConfig, grid: SampleGrid, positions: Sequence[int], add: Add, *, gpu: bool
) -> None:
    """Through the bulk engine. A prompt that leaves no room for an answer has none."""
    path = resolve("model", model.path)
    tokenizer = load_tokenizer(path)
    thinking = model.extra_body.get("chat_template_kwargs", {}).get("enable_thinking")
    engine = start_batch_engine(
        EngineSettings(
            model=path,
            precision=model.precision,
            max_model_len=model.max_model_len,
            gpu=gpu,
            limits=model.engine,
        )
    )

    def requests() -> Iterator[BatchRequest]:
        for position in positions:
            item, _ = grid.at(position)
            token_ids = chat_ids(item.messages, tokenizer, thinking)
            if len(token_ids) >= model.max_model_len:
                add(position, grid.row(position, "", "prompt_too_long", 0))
                continue
            yield BatchRequest(key=position, token_ids=token_ids, seed=grid.seed_at(position))

    most = min(grid.sampling.max_tokens, model.max_model_len)
    sampling = replace(grid.sampling, max_tokens=most)
    for response in engine.generate(requests(), sampling):
        text = str(tokenizer.decode(list(response.token_ids), skip_special_tokens=True))
        row = grid.row(response.key, text, response.finish_reason, len(response.token_ids))
        if add(response.key, row):
            log.info("generating: a block of answers is saved")
    engine.close()


def ask_all(chat: ChatModel, grid: SampleGrid, positions: Sequence[int], add: Add) -> None:
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
        add(position, grid.row(position, written, reason))

    run_calls([partial(ask, position) for position in positions], [chat])
    log.info("generating: %s", usage)
