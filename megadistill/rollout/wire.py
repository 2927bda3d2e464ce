"""The messages between `EnginePool` and an engine process, validated on both sides.

    GET  /health            -> Health
    POST /generate Generate -> NDJSON of Line: Sequences as they finish, Alive between, then End
    POST /weights  Weights  -> NDJSON of Line: Loaded
    POST /sleep  /wake  /shutdown -> NDJSON of Line: Done

A Failure may take the place of any line and is then the last one.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")

MAX_BODY_BYTES = 256 << 20
"""Largest request an engine reads: 512 prompts of 64k tokens fit."""

HEARTBEAT_S = 1.0
"""Seconds between signs of life while an engine generates."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Request:
    """One prompt to continue."""

    id: int
    """Position in the caller's batch; echoed in the `Sequence`."""
    token_ids: Annotated[list[int], Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, lt=1 << 31)]
    max_tokens: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sampling:
    """How tokens are drawn; the same for a whole batch."""

    temperature: Annotated[float, Field(gt=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Annotated[int, Field(ge=0)]
    """0 switches top-k sampling off."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Generate:
    """A batch; all of it is queued before the engine's first step."""

    requests: Annotated[list[Request], Field(min_length=1)]
    sampling: Sampling
    version: int
    """The weights version the caller expects; an engine with another one refuses."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Weights:
    """Safetensors files, readable by the engine, that hold every tensor of the model."""

    version: int
    files: Annotated[list[str], Field(min_length=1)]
    checksum: str
    """`megadistill.publish.checksum` of the files' tensors."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Empty:
    """The body of a request that needs none."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sequence:
    """A finished response."""

    kind: Literal["sequence"] = "sequence"
    id: int
    token_ids: list[int]
    logprobs: list[float]
    """log mu of each sampled token, after temperature, top-p and top-k."""
    finish_reason: Literal["stop", "length"]
    version: int


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Alive:
    """The engine is at work; `unfinished` sequences are still to come."""

    kind: Literal["alive"] = "alive"
    unfinished: int


@dataclass(frozen=True, kw_only=True, config=STRICT)
class End:
    """All `count` sequences were sent."""

    kind: Literal["end"] = "end"
    count: int


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Loaded:
    """The engine now samples with this version."""

    kind: Literal["loaded"] = "loaded"
    version: int
    checksum: str
    """Computed by the engine's workers over the tensors they received."""
    seconds: float


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Done:
    """What was asked is done."""

    kind: Literal["done"] = "done"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Failure:
    """Why the engine could not do what was asked."""

    kind: Literal["failure"] = "failure"
    message: str
    status: int = 500
    """HTTP status, where nothing was sent yet."""


Line = Annotated[
    Sequence | Alive | End | Loaded | Done | Failure,
    Field(discriminator="kind"),
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Health:
    """The state of an engine."""

    version: int
    checksum: str | None
    """Absent until weights were published into this engine."""
    busy: bool


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EngineAddress:
    """What an engine writes into the run directory once it listens, or when it cannot start."""

    host: str
    """Address it is bound to."""
    port: int
    node: str
    """Name of its machine, for people."""
    pid: int
    version: int
    started: float
    """Seconds since the epoch."""
    error: str | None = None
    """Why it could not start; `port` is 0 then."""


Body = Generate | Weights | Empty

GENERATE = TypeAdapter(Generate)
WEIGHTS = TypeAdapter(Weights)
EMPTY = TypeAdapter(Empty)
LINE: TypeAdapter[Line] = TypeAdapter(Line)
HEALTH = TypeAdapter(Health)
ENGINE_ADDRESS = TypeAdapter(EngineAddress)
