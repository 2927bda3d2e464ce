"""The client's side of one engine: bounded waiting and retries, errors that name the engine."""

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2
from pydantic import ValidationError

from megadistill.rollout import wire

CONNECT_RETRIES = 2
"""Where no connection was made: the engine then saw nothing of the request."""
CONNECT_TIMEOUT_S = 5.0
"""Of each try."""


class EngineError(RuntimeError):
    """An engine failed, or answered what it should not; the message names it and its node."""


class EngineTimeoutError(EngineError):
    """An engine did not answer in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Sends requests to one engine, each over a connection of its own."""

    index: int
    address: wire.EngineAddress
    token: str
    log_hint: str = ""
    """Where the engine's log lies, for error messages."""

    @property
    def name(self) -> str:
        where = f"{self.address.node} at {self.address.host}:{self.address.port}"
        return f"rollout engine {self.index} on {where}{self.log_hint}"

    def health(self, timeout_s: float = 2 * CONNECT_TIMEOUT_S) -> wire.Health:
        """What the engine says of itself."""
        with self._request("GET", "/health", b"", timeout_s) as response:
            content = response.read()
            if response.status_code != 200:
                raise EngineError(f"{self.name}: refused /health: {_message(content)}")
            return wire.Health.model_validate_json(content)

    def ask(
        self,
        path: str,
        body: wire.Body,
        *,
        idle_s: float,
        total_s: float,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[wire.Line]:
        """POST `body` and yield the answer's lines, without signs of life.

        Raises `EngineTimeoutError` after `idle_s` seconds without a line or `total_s` in all,
        `EngineError` when the engine fails, breaks off or sends something else than lines.
        Returns early once `cancelled()` is true; closing the connection stops the engine.
        """
        begun = time.monotonic()
        content = body.model_dump_json().encode()
        with self._request("POST", path, content, min(idle_s, total_s)) as response:
            for text in _lines(response):
                line = wire.LINE.validate_json(text)
                if isinstance(line, wire.Failure):
                    raise EngineError(f"{self.name}: {path}: {line.message}")
                if not isinstance(line, wire.Alive):
                    yield line
                if cancelled():
                    return
                if time.monotonic() - begun > total_s:
                    raise EngineTimeoutError(f"{self.name}: {path} took over {total_s:g} s")

    @contextmanager
    def _request(
        self, method: str, path: str, content: bytes, idle_s: float
    ) -> Iterator[httpx2.Response]:
        """A response that is read in the block, whose end closes the connection."""
        url = f"http://{self.address.host}:{self.address.port}{path}"
        # The wire is plain HTTP: certificates, which take 30 ms to load, are for nothing.
        transport = httpx2.HTTPTransport(
            verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), retries=CONNECT_RETRIES
        )
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        begun = time.monotonic()
        try:
            with (
                # Our own traffic never goes through a proxy, whatever the environment says.
                httpx2.Client(
                    transport=transport,
                    timeout=httpx2.Timeout(idle_s, connect=CONNECT_TIMEOUT_S),
                    trust_env=False,
                ) as client,
                client.stream(method, url, content=content, headers=headers) as response,
            ):
                yield response
        except httpx2.ConnectTimeout as error:
            raise EngineTimeoutError(
                f"{self.name}: no connection in {time.monotonic() - begun:.0f} s"
            ) from error
        except httpx2.TimeoutException as error:
            raise EngineTimeoutError(
                f"{self.name}: {path}: no answer for {idle_s:g} s "
                f"({time.monotonic() - begun:.0f} s after the request)"
            ) from error
        except httpx2.TransportError as error:
            raise EngineError(f"{self.name}: {path}: connection lost: {error}") from error
        except ValidationError as error:
            raise EngineError(f"{self.name}: {path}: garbage in the answer: {error}") from error


def _lines(response: httpx2.Response) -> Iterator[bytes]:
    """The answer's lines; httpx2's own would also break at separators inside of a text."""
    rest = b""
    for chunk in response.iter_bytes():
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _message(content: bytes) -> str:
    """The failure inside an answer, or its beginning when it is something else."""
    try:
        line = wire.LINE.validate_json(content)
    except ValidationError:
        return repr(content[:200])
    return line.message if isinstance(line, wire.Failure) else repr(line)
