"""The HTTP front of an engine process: checks who asks, queues what they ask, streams answers.

Handler threads only queue jobs. The engine runs in one thread, `EngineServer.work`, because
CUDA's current device and OpenMP's workers belong to a thread, and because jobs done one after
the other cannot see the weights change in their middle.
"""

import hmac
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Protocol

from pydantic import TypeAdapter, ValidationError

from megadistill.rollout import wire

log = logging.getLogger(__name__)

SOCKET_TIMEOUT_S = 60
"""Seconds a client may take to send its request or to accept an answer."""


POLL_S = 0.05
"""Seconds until the accepting thread notices a shutdown."""


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
    lines: "queue.Queue[wire.Line | None]" = field(default_factory=queue.Queue)
    """Answers for the handler thread; None ends them."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    answered: threading.Event = field(default_factory=threading.Event)


BODIES: dict[str, TypeAdapter[wire.Generate] | TypeAdapter[wire.Weights] | TypeAdapter[wire.Empty]]
BODIES = {
    "/generate": wire.GENERATE,
    "/weights": wire.WEIGHTS,
    "/sleep": wire.EMPTY,
    "/wake": wire.EMPTY,
    "/shutdown": wire.EMPTY,
}


class EngineServer(ThreadingHTTPServer):
    """Listens from the moment it is made; `work` runs the engine until a shutdown is asked."""

    daemon_threads = True

    def __init__(self, engine: HostedEngine, token: str, host: str) -> None:
        super().__init__((host, 0), Handler)
        self.engine = engine
        self.token = token
        self.jobs: queue.Queue[Job] = queue.Queue()
        self.busy = False
        self._acceptor = threading.Thread(target=self.serve_forever, args=(POLL_S,), daemon=True)
        self._acceptor.start()

    def health(self) -> wire.Health:
        engine = self.engine
        return wire.Health(version=engine.version, checksum=engine.checksum, busy=self.busy)

    def work(self) -> None:
        """Do jobs in order, in the calling thread; an engine that fails ends the process."""
        while True:
            job = self.jobs.get()
            self.busy = True
            try:
                for line in self._answers(job):
                    job.lines.put(line)
            except RequestError as error:
                job.lines.put(wire.Failure(message=str(error), status=400))
            except Exception as error:
                # After a failure inside vLLM its state is unknown: report it, then let it crash.
                job.lines.put(wire.Failure(message=f"{type(error).__name__}: {error}"))
                job.lines.put(None)
                job.answered.wait(SOCKET_TIMEOUT_S)
                raise
            finally:
                self.busy = False
            job.lines.put(None)
            if job.path == "/shutdown":
                job.answered.wait(SOCKET_TIMEOUT_S)
                self.shutdown()
                self.server_close()
                return

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


class Handler(BaseHTTPRequestHandler):
    """One connection: one request, answered and closed."""

    timeout = SOCKET_TIMEOUT_S
    server: EngineServer
    server_version = "megadistill"
    sys_version = ""

    def do_GET(self) -> None:
        if not self._authorized():
            return
        if self.path == "/health":
            self._send(200, wire.HEALTH.dump_json(self.server.health()) + b"\n")
        else:
            self._fail(404, f"no such path: {self.path}")

    def do_POST(self) -> None:
        if not self._authorized() or (body := self._body()) is None:
            return
        job = Job(self.path, body)
        self.server.jobs.put(job)
        try:
            self._stream(job)
        except OSError as error:
            log.warning("%s: client %s left: %s", self.path, self.client_address[0], error)
            job.cancelled.set()
        finally:
            job.answered.set()

    def _stream(self, job: Job) -> None:
        line = job.lines.get()
        self.send_response(line.status if isinstance(line, wire.Failure) else 200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()
        while line is not None:
            self.wfile.write(wire.LINE.dump_json(line) + b"\n")
            self.wfile.flush()
            line = job.lines.get()

    def _authorized(self) -> bool:
        found = self.headers.get("Authorization", "").encode()
        if hmac.compare_digest(found, f"Bearer {self.server.token}".encode()):
            return True
        self._fail(401, "missing or wrong token")
        return False

    def _body(self) -> wire.Body | None:
        """The validated body; None after an error was answered."""
        adapter = BODIES.get(self.path)
        length = self.headers.get("Content-Length", "")
        if adapter is None:
            self._fail(404, f"no such path: {self.path}")
        elif not length.isdecimal():
            self._fail(411, "Content-Length is missing")
        elif int(length) > wire.MAX_BODY_BYTES:
            self._fail(413, f"found a body of {length} bytes, at most {wire.MAX_BODY_BYTES}")
        else:
            try:
                return adapter.validate_json(self.rfile.read(int(length)))
            except ValidationError as error:
                self._fail(400, str(error))
        return None

    def _fail(self, status: int, message: str) -> None:
        self._send(status, wire.LINE.dump_json(wire.Failure(message=message, status=status)))

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """No line per request: the engine logs what it did."""
