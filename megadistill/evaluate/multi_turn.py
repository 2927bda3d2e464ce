"""Answers that take several turns between the system and the judge's model: scenes."""

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megadistill.config.refine import ChatModelConfig
from megadistill.evaluate.protocol import Chat, MultiTurn
from megadistill.evaluate.sample_grid import SampleGrid
from megadistill.inference.chat import ChatError, ChatModel, Usage, run_calls
from megadistill.inference.requests import ChatRequest
from megadistill.inference.serving import open_models
from megadistill.refine.blocks import Blocks

log = logging.getLogger(__name__)

SCENES = 16
"""Under way at the same time; each waits for one line at a time."""
_MODEL: TypeAdapter[ChatModelConfig] = TypeAdapter(ChatModelConfig)


def run_scenes(
    multi_turn: MultiTurn,
    runtime: Mapping[str, Any],
    names: tuple[str, str],
    grid: SampleGrid,
    blocks: Blocks,
    directory: Path,
) -> None:
    """Run the scenes that `blocks` lacks; `names`: of the system, and of the judge's model."""
    configs = {
        "actor": _MODEL.validate_python(runtime["systems"][names[0]]),
        "director": _MODEL.validate_python(runtime["models"][names[1]]),
    }
    usage = Usage()
    with open_models(configs, gpu=runtime["gpu"], logs=directory) as models:
        actor, director = (chat_with(models[role], usage) for role in configs)

        async def run_scene(position: int) -> None:
            """One scene; without an answer when it broke off."""
            item, _ = grid.at(position)
            try:
                written, reason = await multi_turn(item, actor, director), "stop"
            except ChatError as error:
                written, reason = "", str(error)
            blocks.add(position, grid.row(position, written, reason))

        calls = [partial(run_scene, position) for position in blocks.missing()]
        run_calls(calls, models.values(), SCENES)
    log.info("scenes: %s", usage)


def chat_with(model: ChatModel, usage: Usage) -> Chat:
    """The model as a scene sees it."""

    async def chat(tries: Iterable[ChatRequest]) -> str:
        return await model.ask_until_parsed(tries, lambda text: text or None, usage)

    return chat
