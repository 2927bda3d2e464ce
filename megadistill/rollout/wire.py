"""The messages between `EnginePool` and an engine process, validated on both sides.

    GET  /health            -> Health
    POST /generate Generate -> NDJSON of Line: Sequences as they finish, Alive between, then End
    POST /weights  Weights  -> NDJSON of Line: Loaded
    POST /sleep  /wake  /shutdown -> NDJSON of Line: Done

A Failure may take the place of any line and is then the last one.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

MAX_BODY_BYTES = 256 << 20
"""Largest request an engine reads: 512 prompts of 64k tokens fit."""

HEARTBEAT_S = 1.0
"""Seconds between signs of life while an engine generates."""


class Message(BaseModel):
    """Immutable, without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Request(Message):
    """One prompt to continue."""

    id: int
    """Position in the caller's batch; echoed in the `Sequence`."""
    token_ids: Annotated[list[int], Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, lt=1 << 31)]
    max_tokens: Annotated[int, Field(ge=1)]


class Sampling(Message):
    """How tokens are drawn; the same for a whole batch."""

    temperature: Annotated[float, Field(gt=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Annotated[int, Field(ge=0)]
    """0 switches top-k sampling off."""


class Generate(Message):
    """A batch; all of it is queued before the engine's first step."""

    requests: Annotated[list[Request], Field(min_length=1)]
    sampling: Sampling
    version: int
    """The weights version the caller expects; an engine with another one refuses."""


class Weights(Message):
    """Safetensors files, readable by the engine, that hold every tensor of the model."""

    version: int
    files: Annotated[list[str], Field(min_length=1)]
    checksum: str
    """`megadistill.publish.checksum` of the files' tensors."""


class Empty(Message):
    """The body of a request that needs none."""


class Sequence(Message):
    """A finished response."""

    kind: Literal["sequence"] = "sequence"
    id: int
    token_ids: list[int]
    logprobs: list[float]
    """log mu of each sampled token, after temperature, top-p and top-k."""
    finish_reason: Literal["stop", "length"]
    version: int


class Alive(Message):
    """The engine is at work; `unfinished` sequences are still to come."""

    kind: Literal["alive"] = "alive"
    unfinished: int


class End(Message):
    """All `count` sequences were sent."""

    kind: Literal["end"] = "end"
    count: int


class Loaded(Message):
    """The engine now samples with this version."""

    kind: Literal["loaded"] = "loaded"
    version: int
    checksum: str
    """Computed by the engine's workers over the tensors they received."""
    seconds: float


class Done(Message):
    """What was asked is done."""

    kind: Literal["done"] = "done"


class Failure(Message):
    """Why the engine could not do what was asked."""

    kind: Literal["failure"] = "failure"
    message: str
    status: int = 500
    """HTTP status, where nothing was sent yet."""


Line = Annotated[
    Sequence | Alive | End | Loaded | Done | Failure,
    Field(discriminator="kind"),
]


class Health(Message):
    """The state of an engine."""

    version: int
    checksum: str | None
    """Absent until weights were published into this engine."""
    busy: bool


class EngineAddress(Message):
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
LINE: TypeAdapter[Line] = TypeAdapter(Line)
