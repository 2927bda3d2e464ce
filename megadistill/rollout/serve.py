"""The HTTP front of an engine process: checks who asks, queues what they ask, streams answers.

FastAPI, on a thread of its own, only queues jobs. The engine runs in one thread, `EngineServer.work`,
because CUDA's current device and OpenMP's workers belong to a thread, and because jobs done one after
the other cannot see the weights change in their middle.
"""

import asyncio
import hmac
import queue
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from megadistill.rollout import wire

REQUEST_TIMEOUT_S = 60
"""Seconds a client may take to send the body of its request."""

LAST_ANSWER_S = 10
"""Seconds an engine that ends gives its clients to take their answers."""


class RequestError(ValueError):
    """The caller asked for something that this engine cannot do; the engine is unharmed."""


class HostedEngine(Protocol):
    """What the front needs of the engine behind it."""

    version: int
    checksum: str | None

    def generate(
        self, body: wire.Generate, cancelled: Callable[[], bool]
    ) -> Iterator[wire.Sequence | wire.Alive | wire.End]: ...
    def load_weights(self, body: wire.Weights) -> wire.Loaded: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Job:
    """One request on its way through the engine's thread."""

    path: str
    body: wire.Body
    loop: asyncio.AbstractEventLoop
    lines: asyncio.Queue[wire.Line | None] = field(default_factory=asyncio.Queue)
    """Answers for the web server, which alone reads them; None ends them."""
    cancelled: threading.Event = field(default_factory=threading.Event)

    def answer(self, line: wire.Line | None) -> None:
        """Send a line, from the engine's thread."""
        self.loop.call_soon_threadsafe(self.lines.put_nowait, line)


BODIES: dict[str, type[wire.Body]] = {
    "/generate": wire.Generate,
    "/weights": wire.Weights,
    "/sleep": wire.Empty,
    "/wake": wire.Empty,
    "/shutdown": wire.Empty,
}


class EngineServer:
    """Listens from the moment it is made; `work` runs the engine until a shutdown is asked."""

    def __init__(self, engine: HostedEngine, token: str, host: str) -> None:
        self.engine = engine
        self.busy = False
        self._token = token
        self._jobs: queue.Queue[Job] = queue.Queue()
        listener = socket.create_server((host, 0))
        self.server_port: int = listener.getsockname()[1]
        self._web = uvicorn.Server(
            uvicorn.Config(
                self._application(),
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,  # the engine logs what it did
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=LAST_ANSWER_S,
            )
        )
        # Outside of the main thread uvicorn leaves the signals alone.
        self._thread = threading.Thread(target=self._web.run, args=([listener],), daemon=True)
        self._thread.start()

    def work(self) -> None:
        """Do jobs in order, in the calling thread; an engine that fails ends the process."""
        while True:
            job = self._jobs.get()
            self.busy = True
            try:
                for line in self._answers(job):
                    job.answer(line)
            except RequestError as error:
                job.answer(wire.Failure(message=str(error), status=400))
            except Exception as error:
                # After a failure inside vLLM its state is unknown: report it, then let it crash.
                job.answer(wire.Failure(message=f"{type(error).__name__}: {error}"))
                job.answer(None)
                self.close()
                raise
            finally:
                self.busy = False
            job.answer(None)
            if job.path == "/shutdown":
                self.close()
                return

    def close(self) -> None:
        """Stop listening once the answers so far are sent."""
        self._web.should_exit = True
        self._thread.join()

    def _answers(self, job: Job) -> Iterator[wire.Line]:
        body = job.body
        if isinstance(body, wire.Generate):
            if body.version != self.engine.version:
                raise RequestError(
                    f"found weights version {self.engine.version}, expected {body.version}"
                )
            yield from self.engine.generate(body, job.cancelled.is_set)
        elif isinstance(body, wire.Weights):
            yield self.engine.load_weights(body)
        else:
            if job.path == "/sleep":
                self.engine.sleep()
            elif job.path == "/wake":
                self.engine.wake()
            yield wire.Done()

    def _application(self) -> FastAPI:
        app = FastAPI(openapi_url=None, dependencies=[Depends(self._authorize)])
        app.add_api_route("/health", self._health)
        for path in BODIES:
            app.add_api_route(path, self._ask, methods=["POST"])

        @app.exception_handler(AnyHTTPException)
        async def refuse(_: Request, error: AnyHTTPException) -> Response:
            return failure(error.detail, error.status_code)

        @app.exception_handler(ValidationError)
        async def refuse_body(_: Request, error: ValidationError) -> Response:
            return failure(str(error), 400)

        return app

    async def _authorize(self, request: Request) -> None:
        found = request.headers.get("Authorization", "").encode("latin-1")
        if not hmac.compare_digest(found, f"Bearer {self._token}".encode()):
            raise HTTPException(401, "missing or wrong token")

    async def _health(self) -> wire.Health:
        engine = self.engine
        return wire.Health(version=engine.version, checksum=engine.checksum, busy=self.busy)

    async def _ask(self, request: Request) -> Response:
        """Queue a job and stream its answer, whose first line decides the status."""
        length = request.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise HTTPException(411, "Content-Length is missing")
        if int(length) > wire.MAX_BODY_BYTES:
            raise HTTPException(
                413, f"found a body of {length} bytes, at most {wire.MAX_BODY_BYTES}"
            )
        path = request.url.path
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                content = await request.body()
        except (TimeoutError, ClientDisconnect) as error:
            raise HTTPException(408, "the body did not come") from error
        body = BODIES[path].model_validate_json(content)
        job = Job(path, body, asyncio.get_running_loop())
        self._jobs.put(job)
        first = await job.lines.get()
        status = first.status if isinstance(first, wire.Failure) else 200
        return StreamingResponse(stream(job, first), status, media_type="application/x-ndjson")


async def stream(job: Job, line: wire.Line | None) -> AsyncIterator[bytes]:
    """The lines of an answer from `line` on; a client that leaves stops its job."""
    try:
        while line is not None:
            yield line.model_dump_json().encode() + b"\n"
            line = await job.lines.get()
    finally:
        job.cancelled.set()


def failure(message: str, status: int) -> Response:
    """The answer to a request that is no job."""
    line = wire.Failure(message=message, status=status)
    return Response(line.model_dump_json(), status, media_type="application/json")
