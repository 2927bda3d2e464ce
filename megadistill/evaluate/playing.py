"""Answers that take several turns between the system and the judge's model: scenes."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megadistill.config.refine import ChatModelConfig
from megadistill.evaluate.chats import opened
from megadistill.evaluate.protocol import Ask, Chat, Item, Play
from megadistill.evaluate.questions import Questions, gather_bounded
from megadistill.refine.blocks import Blocks
from megadistill.refine.endpoints import Asked, ChatModel, RecordError, Usage

log = logging.getLogger(__name__)

SCENES = 16
"""Played at the same time; each waits for one line at a time."""
_MODEL: TypeAdapter[ChatModelConfig] = TypeAdapter(ChatModelConfig)


def play_all(
    play: Play,
    runtime: Mapping[str, Any],
    names: tuple[str, str],
    questions: Questions,
    blocks: Blocks,
    directory: Path,
) -> None:
    """Play what `blocks` lacks; `names`: of the system, and of the judge's model."""
    configs = {
        "actor": _MODEL.validate_python(runtime["systems"][names[0]]),
        "director": _MODEL.validate_python(runtime["models"][names[1]]),
    }
    usage = Usage()
    with opened(configs, gpu=runtime["gpu"], logs=directory) as chats:
        actor, director = (chat_with(chats[role], usage) for role in configs)

        def scene(item: Item) -> Awaitable[str]:
            return play(item, actor, director)

        calls = [partial(play_one, scene, questions, at, blocks) for at in blocks.missing()]
        asyncio.run(gather_bounded(calls, SCENES))
    log.info("playing: %s", usage)


async def play_one(
    scene: Callable[[Item], Awaitable[str]], questions: Questions, position: int, blocks: Blocks
) -> None:
    """One scene; without an answer when it broke off."""
    item, _ = questions.at(position)
    try:
        written, reason = await scene(item), "stop"
    except RecordError as error:
        written, reason = "", str(error)
    row = questions.row(position, written=written, num_tokens=None, finish_reason=reason)
    blocks.add(position, row)


def chat_with(model: ChatModel, usage: Usage) -> Chat:
    """The model as a play sees it."""

    async def chat(ask: Ask, seed: int) -> str:
        asked = Asked(
            messages=ask.messages,
            temperature=ask.temperature,
            max_tokens=ask.max_tokens,
            seed=seed,
        )
        return (await model.ask(asked, usage)).text

    return chat
