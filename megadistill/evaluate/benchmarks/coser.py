"""CoSER: scenes of novels played by the system, with another model as world and director, then judged.

The order of turns and the arithmetic are `coser_gca`'s, as published; the prompts are in our words,
so scores compare with each other under one judge, and not with published ones.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from megadistill.config.rows import Message
from megadistill.evaluate import coser_gca
from megadistill.evaluate.coser_gca import DIMENSIONS, ENVIRONMENT, Line
from megadistill.evaluate.protocol import Benchmark, Chat, Fields, Item, Judged, Score
from megadistill.inference.requests import ChatRequest, SamplingParams
from megadistill.inference.templates import Template, load_template
from megadistill.resolve import PACKAGE, resolve

FIELDS = {
    "actor": ("name", "book", "profile", "scenario", "others", "motivation"),
    "environment": ("book", "major", "scenario"),
    "next": ("names", "scenario"),
    "judge": (
        *("book", "dimension", "question", "plot", "scenario", "profiles"),
        *("original", "major", "flaws", "simulated"),
    ),
}
TRIES = 5
"""How often somebody is asked for a line until there is one, from the second time at temperature 1."""


def to_item(row: Fields) -> Item:
    """A conversation of CoSER's test_set.json."""
    plot, speakers = row["plot"], list(row["speaking_characters_w_env"])
    if not speakers or not row["dialogues"]:
        raise ValueError("has no speakers or no dialogue")
    scene = {
        "book": row["book"],
        "plot": plot["summary"],
        "scenario": row["scenario"],
        "speakers": speakers if ENVIRONMENT in speakers else [*speakers, ENVIRONMENT],
        "major": [name for name in row["major_characters"] if name != ENVIRONMENT],
        "profiles": profiles(row),
        "motivations": {who["name"]: who.get("motivation", "") for who in row["key_characters"]},
        "original": [[line["character"], line["message"]] for line in row["dialogues"]],
    }
    name = f"{row['book']}-{plot['i_p']}-{row['i_c']}"
    return Item(id=name, messages=opening("next", scene), text=row["scenario"], reference=scene)


def profiles(row: Fields) -> dict[str, str]:
    """Of each speaker: its part in the plot, then its profile."""
    in_plot = {who["name"]: who.get("description", "") for who in row["plot"]["key_characters"]}
    found = {}
    for name in row["speaking_characters_w_env"]:
        parts = (in_plot.get(name, ""), row["character_profiles"].get(name, ""))
        text = "\n\n".join(part.strip() for part in parts if part and part.strip())
        if text and name != ENVIRONMENT:
            found[name] = text
    return found


def opening(role: str, scene: Mapping[str, Any], name: str = "") -> tuple[Message, ...]:
    """What a participant reads before the first line; `role` names a template."""
    others = [f"{who}: {text}" for who, text in scene["profiles"].items() if who != name]
    values = {
        "name": name,
        "book": scene["book"],
        "scenario": scene["scenario"],
        "profile": scene["profiles"].get(name, "-"),
        "others": "\n\n".join(others) or "-",
        "motivation": scene["motivations"].get(name) or "-",
        "names": ", ".join(scene["speakers"]),
        "major": ", ".join(scene["major"]),
    }
    return tuple(_template(role).fill(values))


def seen_by(name: str, start: Sequence[Message], scene: Sequence[Line]) -> tuple[Message, ...]:
    """The scene as a chat of `name`: own lines as they were, those of others without thoughts."""
    chat = [dict(message) for message in start]
    for line in scene:
        own = line.speaker == name
        role, text = ("assistant", line.text) if own else ("user", f"{line.speaker}: {line.heard}")
        if chat[-1]["role"] == role:
            chat[-1]["content"] += f"\n\n{text}"
        else:
            chat.append({"role": role, "content": text})
    return tuple(chat)


async def scene_of(item: Item, actor: Chat, director: Chat) -> str:
    """One scene as JSON: [speaker, text] of every turn."""
    scene = item.reference
    director_start = opening("next", scene)

    async def speak(name: str, lines: Sequence[Line]) -> str:
        if name == ENVIRONMENT:
            chat = seen_by(name, opening("environment", scene), lines)
            return await _line(director, chat)
        return await _line(actor, seen_by(name, opening("actor", scene, name), lines))

    async def predict(lines: Sequence[Line]) -> str:
        return await _line(director, seen_by("", director_start, lines))

    lines = await coser_gca.simulate(scene["speakers"], scene["major"], speak, predict)
    return json.dumps([[line.speaker, line.text] for line in lines], ensure_ascii=False)


async def _line(model: Chat, chat: tuple[Message, ...]) -> str:
    """What somebody says; nothing when every try came to nothing."""
    first, again = (SamplingParams(temperature=t, max_tokens=512) for t in (0.0, 1.0))
    return await model(
        ChatRequest(messages=chat, sampling=again if number else first, seed=number)
        for number in range(TRIES)
    )


def requests(item: Item, answer: str) -> Sequence[ChatRequest]:
    """One question a dimension."""
    return [_question(item, dimension, lines_of(answer)) for dimension in DIMENSIONS]


def score_replies(item: Item, answer: str, replies: Sequence[str]) -> Score:
    """The mean of the four dimensions; a scene with an unreadable verdict weighs nothing."""
    lines = lines_of(answer)
    found = coser_gca.scene_scores(lines, dict(zip(DIMENSIONS, replies, strict=True)))
    if len(found) < len(DIMENSIONS):
        return Score(value=0.0, weight=0.0)
    details = {**found, "turns": float(len(lines))}
    return Score(value=sum(found.values()) / len(found) / 100, details=details)


def lines_of(answer: str) -> list[Line]:
    """The scene that `scene_of` wrote."""
    return [Line(speaker=speaker, text=text) for speaker, text in json.loads(answer)]


def _question(item: Item, dimension: str, lines: Sequence[Line]) -> ChatRequest:
    scene = item.reference
    original = [Line(speaker=speaker, text=text) for speaker, text in scene["original"]]
    values = {
        "dimension": dimension,
        **_dimensions()[dimension],
        "book": scene["book"],
        "plot": scene["plot"],
        "scenario": scene["scenario"],
        "major": ", ".join(scene["major"]),
        "profiles": "\n\n".join(f"{who}: {text}" for who, text in scene["profiles"].items()),
        "original": "\n\n".join(f"{line.speaker}: {line.heard}" for line in original),
        "simulated": "\n\n".join(f"{line.speaker}: {line.heard}" for line in lines),
    }
    messages = _template("judge").fill(values)
    return ChatRequest(messages=messages, sampling=SamplingParams(max_tokens=4096))


@functools.cache
def _dimensions() -> dict[str, dict[str, str]]:
    """Dimension -> the `question` that a critic answers, and the kinds of `flaws`."""
    file = resolve("data", f"{PACKAGE}megadistill/inference/templates/coser-dimensions-v1.yaml")
    found: dict[str, dict[str, str]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


def _template(role: str) -> Template:
    return load_template(f"packaged:coser-{role}-v1", FIELDS[role])


COSER = Benchmark(
    title="CoSER GCA",
    block="domain",
    sampling=SamplingParams(max_tokens=512),
    rows=to_item,
    multi_turn=scene_of,
    judged=Judged(requests=requests, parse=coser_gca.severities, score_replies=score_replies),
    strip_thinking=False,
    hint="data/test/test_set.json of a checkout of github.com/Neph0s/CoSER",
    size=200,
)
