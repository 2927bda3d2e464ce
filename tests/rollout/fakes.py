"""Engines without vLLM: one that behaves, behind the real HTTP front, and scripted ones."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megadistill.config.schema import RolloutConfig
from megadistill.rollout import wire
from megadistill.rollout.client import EnginePool
from megadistill.rollout.connection import Connection
from megadistill.rollout.serve import EngineServer, RequestError
from megadistill.types import Prompt

TOKEN = "right"

Script = Callable[[BaseHTTPRequestHandler], None]


class EchoEngine:
    """Answers a prompt with its own tokens, backwards; a prompt of only zeros is refused."""

    def __init__(self) -> None:
        self.version = 0
        self.checksum: str | None = None
        self.calls: list[str] = []
        self.gate = threading.Event()
        """A prompt that begins with 99 waits for it."""
        self.cancellations = 0

    def generate(
        self, body: wire.Generate, cancelled: Callable[[], bool]
    ) -> Iterator[wire.Sequence | wire.Alive | wire.End]:
        for request in body.requests:
            if not any(request.token_ids):
                raise RequestError(f"request {request.id}: only zeros")
        for request in body.requests:
            while request.token_ids[0] == 99 and not self.gate.wait(0.02):
                if cancelled():
                    self.cancellations += 1
                    return
                yield wire.Alive(unfinished=1)
            yield wire.Sequence(
                id=request.id,
                token_ids=request.token_ids[::-1][: request.max_tokens],
                logprobs=[-0.5] * min(len(request.token_ids), request.max_tokens),
                finish_reason="stop",
                version=self.version,
            )
        yield wire.End(count=len(body.requests))

    def load_weights(self, body: wire.Weights) -> wire.Loaded:
        self.version, self.checksum = body.version, body.checksum
        return wire.Loaded(version=body.version, checksum=body.checksum, seconds=0.0)

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self) -> None:
        self.calls.append("wake")

    def close(self) -> None:
        self.calls.append("close")


def address(port: int, **changes: str | int | None) -> wire.EngineAddress:
    values = {"host": "127.0.0.1", "port": port, "node": "node7", "pid": 1, "version": 0}
    return wire.EngineAddress.model_validate({**values, "started": 0.0, **changes})


def pool_of(*ports: int, token: str = TOKEN, timeout_s: int = 5) -> EnginePool:
    engines = tuple(
        Connection(index=index, address=address(port), token=token)
        for index, port in enumerate(ports)
    )
    return EnginePool(engines, RolloutConfig(timeout_s=timeout_s))


@contextmanager
def serving(engine: EchoEngine) -> Iterator[int]:
    """The port of `engine`'s HTTP front, whose engine thread runs in the background."""
    server = EngineServer(engine, TOKEN, "127.0.0.1")
    worker = threading.Thread(target=server.work, daemon=True)
    worker.start()
    yield server.server_port
    if worker.is_alive():
        engine.gate.set()
        pool_of(server.server_port).shutdown()
        worker.join(5)


@contextmanager
def scripted(script: Script, port: int = 0) -> Iterator[int]:
    """The port of a server that reads each request whole and then does what `script` says."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            script(self)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(handler: BaseHTTPRequestHandler, *lines: wire.Line | bytes) -> None:
    """Answer 200 with these lines; bytes are sent as they are."""
    handler.send_response(200)
    handler.end_headers()
    for line in lines:
        handler.wfile.write(line if isinstance(line, bytes) else wire.LINE.dump_json(line) + b"\n")
        handler.wfile.flush()


def sequence(index: int, version: int = 0) -> wire.Sequence:
    return wire.Sequence(
        id=index, token_ids=[7, 8], logprobs=[-1.0, -2.0], finish_reason="stop", version=version
    )


def prompt(*token_ids: int) -> Prompt:
    return Prompt(id=str(token_ids), pool="p", messages=(), token_ids=token_ids)


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true after {seconds} s"
        time.sleep(0.02)


def write_address(file: Path, values: wire.EngineAddress) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(values.model_dump_json())
