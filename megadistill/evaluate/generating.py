"""Answers of one system to one share of a benchmark: through vLLM in the shard, or an endpoint."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megadistill.config.refine import ChatModelConfig, EndpointConfig, ServedConfig
from megadistill.convert.hf_files import resolve_model
from megadistill.data.pools import render_ids
from megadistill.evaluate.benchmarks import get_benchmark, read_items
from megadistill.evaluate.playing import play_all
from megadistill.evaluate.protocol import Draw, Item
from megadistill.evaluate.questions import COLUMNS, Questions, gather_bounded
from megadistill.refine.blocks import Blocks
from megadistill.refine.endpoints import Asked, ChatModel, RecordError, Usage, open_endpoint
from megadistill.refine.prompts import load_tokenizer
from megadistill.refine.serving import served
from megadistill.refine.stages import Stage, part_of
from megadistill.rollout.batch import BatchRequest, BatchSettings, Sampling, start_batch_engine

log = logging.getLogger(__name__)

_MODEL: TypeAdapter[ChatModelConfig] = TypeAdapter(ChatModelConfig)
_DRAW: TypeAdapter[Draw] = TypeAdapter(Draw)
Add = Callable[[int, Mapping[str, Any]], bool]


def generate(directory: Path, arguments: Mapping[str, Any]) -> None:
    """The shard: answers what its directory lacks. See `pipeline` for the arguments."""
    stage = Stage.of(directory)
    runtime = stage.runtime
    settings = runtime["benchmarks"][arguments["benchmark"]]
    benchmark = get_benchmark(settings["kind"])
    questions = Questions(
        part_of(read_share(settings), arguments["part"], arguments["of"]),
        _DRAW.validate_python(arguments["draw"]),
        arguments["seed"],
    )
    blocks = Blocks(directory, COLUMNS, total=len(questions), size=arguments["block"])
    positions = blocks.missing()
    if not positions:
        return
    model = _MODEL.validate_python(runtime["systems"][arguments["system"]])
    begun = time.monotonic()
    if benchmark.play is not None:
        names = (arguments["system"], settings["judges"][0])
        play_all(benchmark.play, runtime, names, questions, blocks, directory)
    elif isinstance(model, EndpointConfig):
        chat = open_endpoint(arguments["system"], _with_sampling(model, questions.draw))
        asyncio.run(ask_all(chat, questions, positions, blocks.add))
    elif needs_server(questions.draw):
        name = arguments["system"]
        models = {name: _with_sampling(model, questions.draw)}
        with served(models, gpu=runtime["gpu"], logs=directory) as chats:
            asyncio.run(ask_all(chats[name], questions, positions, blocks.add))
    else:
        write_all(model, questions, positions, blocks.add, gpu=runtime["gpu"])
    seconds = time.monotonic() - begun
    stage.note_figures(directory, {"answers": len(positions), "seconds": seconds})


def read_share(settings: Mapping[str, Any]) -> list[Item]:
    """The items of a benchmark as the configuration limits them."""
    items = read_items(settings["kind"], settings["path"])
    return list(items)[: settings["limit"]]


def needs_server(draw: Draw) -> bool:
    """Whether answers are drawn in a way that the bulk engine does not offer."""
    return draw.top_k > 0 or draw.repetition_penalty != 1.0


def write_all(
    model: ServedConfig, questions: Questions, positions: Sequence[int], add: Add, *, gpu: bool
) -> None:
    """Through the bulk engine. A prompt that leaves no room for an answer has none."""
    path = resolve_model(model.path)
    tokenizer = load_tokenizer(path)
    thinking = model.extra_body.get("chat_template_kwargs", {}).get("enable_thinking")
    engine = start_batch_engine(
        BatchSettings(
            model=path,
            precision=model.precision,
            max_model_len=model.max_model_len,
            gpu=gpu,
            tp=model.engine.tp,
            max_num_seqs=model.engine.max_num_seqs,
            memory_fraction=model.engine.memory_fraction,
            kv_cache_gib=model.engine.kv_cache_gib,
            threads=model.engine.threads,
        )
    )
    draw = questions.draw
    lengths: dict[int, int] = {}

    def requests() -> Iterator[BatchRequest]:
        for position in positions:
            item, _ = questions.at(position)
            token_ids = render_ids(item.messages, thinking, tokenizer)
            lengths[position] = len(token_ids)
            if len(token_ids) >= model.max_model_len:
                absent = {"written": "", "num_tokens": 0, "finish_reason": "prompt_too_long"}
                add(position, questions.row(position, **absent))
                continue
            yield BatchRequest(key=position, token_ids=token_ids, seed=questions.seed_at(position))

    sampling = Sampling(
        temperature=draw.temperature,
        top_p=draw.top_p,
        max_tokens=min(draw.max_tokens, model.max_model_len),
    )
    for response in engine.generate(requests(), sampling):
        written = {
            "written": str(tokenizer.decode(list(response.token_ids), skip_special_tokens=True)),
            "num_tokens": len(response.token_ids),
            "finish_reason": response.finish_reason,
        }
        if add(response.key, questions.row(response.key, **written)):
            log.info("generating: a block of answers is saved")
    engine.close()


async def ask_all(
    chat: ChatModel, questions: Questions, positions: Sequence[int], add: Add
) -> None:
    """Through an endpoint, as many at a time as it takes."""
    draw = questions.draw
    usage = Usage()

    async def ask(position: int) -> None:
        item, _ = questions.at(position)
        asked = Asked(
            messages=item.messages,
            temperature=draw.temperature,
            top_p=draw.top_p,
            max_tokens=draw.max_tokens,
            seed=questions.seed_at(position) % (1 << 31),
        )
        written: dict[str, Any] = {"num_tokens": None}
        try:
            answered = await chat.ask(asked, usage)
            written |= {
                "written": answered.text,
                "finish_reason": "length" if answered.cut else "stop",
            }
        except RecordError as error:
            written |= {"written": "", "finish_reason": str(error)}
        add(position, questions.row(position, **written))

    await gather_bounded([partial(ask, position) for position in positions])
    log.info("generating: %s", usage)


def _with_sampling(model: Any, draw: Draw) -> Any:  # either kind of model
    """What OpenAI's interface has no name for goes along as vLLM calls it."""
    extra: dict[str, Any] = {}
    if draw.top_k:
        extra["top_k"] = draw.top_k
    if draw.repetition_penalty != 1.0:
        extra["repetition_penalty"] = draw.repetition_penalty
    return model.model_copy(update={"extra_body": {**model.extra_body, **extra}})
