"""CoSER's given-circumstance acting: the rules of the simulated scene and the judge's arithmetic.

Who speaks is injected, so that any model can play any role; see ALGORITHMS 5.5.
"""

import json
import random
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DIMENSIONS = (
    "Storyline Consistency",
    "Anthropomorphism",
    "Character Fidelity",
    "Storyline Quality",
)
ENVIRONMENT = "Environment"
END = "<END CHAT>"
ROUNDS = 20
FIRST_END = 5
"""Round index from which the end may be called."""
SEED = 42
_NEXT = re.compile(r"next\s+speaker\W*(?:is\b)?\W*([^\n*]+)", re.IGNORECASE)
_THOUGHT = re.compile(r"\[[^\[\]]*\]")
_JSON = re.compile(r"\[.*\]|\{.*\}", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What a character said, as it was written."""

    speaker: str
    text: str

    @property
    def heard(self) -> str:
        """What the others and the judge see of it: without inner thoughts."""
        return re.sub(r"[ \t]{2,}", " ", _THOUGHT.sub("", self.text)).strip()


Speak = Callable[[str, Sequence[Line]], Awaitable[str]]
"""(character, scene so far) -> what it says next."""
Predict = Callable[[Sequence[Line]], Awaitable[str]]
"""Scene so far -> the predictor's reply, a name or the end."""


async def simulate(
    speakers: Sequence[str], major: Sequence[str], speak: Speak, predict: Predict
) -> list[Line]:
    """One scene: `speakers` with the one who opens it first, `major` those drawn at random."""
    chooser = random.Random(SEED)
    scene: list[Line] = []
    speaker = speakers[0]
    for index in range(ROUNDS):
        scene.append(Line(speaker=speaker, text=await speak(speaker, scene)))
        name = named(await predict(scene))
        if name == END and index >= FIRST_END:
            break
        speaker = next_speaker(name, speaker, speakers, major, chooser)
    return scene


def named(reply: str) -> str:
    """Whom the predictor names last: after `Next speaker`, else all that it says."""
    if END.strip("<>") in reply.strip().rpartition("\n")[2]:
        return END
    found = _NEXT.findall(reply)
    return (found[-1] if found else reply.partition(":")[0]).strip().strip(".,!\"'*")


def next_speaker(
    name: str,
    last: str,
    speakers: Sequence[str],
    major: Sequence[str],
    chooser: random.Random,
) -> str:
    """The predicted name; for an unknown one or the last one again, somebody at random."""
    if name in (*speakers, ENVIRONMENT) and name != last:
        return name
    others = [other for other in dict.fromkeys((*major, ENVIRONMENT)) if other != last]
    return chooser.choice(others)


def severities(reply: str) -> list[int] | None:
    """Severities of a judge's flaws; None when the reply has no JSON list of flaws.

    A flaw without a severity counts 1; severities that are no whole numbers are ignored, unless all
    are. Those that are, but written as text or with a point, are read here and ignored by the official
    code.
    """
    found = _JSON.search(reply)
    if found is None:
        return None
    try:
        values = json.loads(found[0])
    except (json.JSONDecodeError, RecursionError):
        return None
    if (flaws := _flaws(values)) is None:
        return None
    levels = (re.fullmatch(r"(\d+)(?:\.0*)?", str(flaw.get("severity", 1))) for flaw in flaws)
    read = [int(level[1]) for level in levels if level]
    return None if flaws and not read else read


def _flaws(values: Any) -> list[Mapping[str, Any]] | None:  # a judge's JSON
    """The list of flaws, at the top or under any key below it; None where there is none."""
    if isinstance(values, list):
        listed: list[Mapping[str, Any]] = [flaw for flaw in values if isinstance(flaw, dict)]
        return listed if listed or not values else None
    if isinstance(values.get("flaws"), list):
        return _flaws(values["flaws"])
    inner = [_flaws(part) for part in values.values() if isinstance(part, dict)]
    found = [flaws for flaws in inner if flaws is not None]
    return [flaw for flaws in found for flaw in flaws] if found else None


def dimension_score(levels: Sequence[int], num_actor_messages: int) -> float:
    """max(0, min(100, 100 - 5 (sum of severities - 0.3 n))): longer scenes may have more flaws."""
    return max(0.0, min(100.0, 100.0 - 5.0 * (sum(levels) - 0.3 * num_actor_messages)))


def scene_scores(scene: Sequence[Line], replies: Mapping[str, str]) -> dict[str, float]:
    """The score of each dimension of which the judge's reply can be read."""
    spoken = sum(line.speaker != ENVIRONMENT for line in scene)
    return {
        dimension: dimension_score(levels, spoken)
        for dimension, reply in replies.items()
        if (levels := severities(reply)) is not None
    }
