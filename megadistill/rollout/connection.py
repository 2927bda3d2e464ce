"""The client's side of one engine: bounded waiting and retries, errors that name the engine."""

import http.client
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from megadistill.rollout import wire

log = logging.getLogger(__name__)

CONNECT_ATTEMPTS = 3
CONNECT_TIMEOUT_S = 10.0
RETRY_PAUSE_S = 1.0


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

    def health(self, timeout_s: float = CONNECT_TIMEOUT_S) -> wire.Health:
        """What the engine says of itself; one attempt."""
        try:
            response = self._send("GET", "/health", b"", timeout_s)
            content = response.read(wire.MAX_BODY_BYTES)
            if response.status != 200:
                raise EngineError(f"{self.name}: refused /health: {_message(content)}")
            return wire.HEALTH.validate_json(content)
        except TimeoutError as error:
            raise EngineTimeoutError(
                f"{self.name}: no answer to /health in {timeout_s:g} s"
            ) from error
        except (OSError, http.client.HTTPException, ValidationError) as error:
            raise EngineError(f"{self.name}: /health failed: {error}") from error

    def ask(
        self,
        path: str,
        body: bytes,
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
        try:
            response = self._connected("POST", path, body, min(idle_s, total_s))
            with response:
                while content := response.readline():
                    line = wire.LINE.validate_json(content)
                    if isinstance(line, wire.Failure):
                        raise EngineError(f"{self.name}: {path}: {line.message}")
                    if not isinstance(line, wire.Alive):
                        yield line
                    if cancelled():
                        return
                    if time.monotonic() - begun > total_s:
                        raise EngineTimeoutError(f"{self.name}: {path} took over {total_s:g} s")
        except TimeoutError as error:
            waited = time.monotonic() - begun
            raise EngineTimeoutError(
                f"{self.name}: {path}: no answer for {min(idle_s, total_s):g} s "
                f"({waited:.0f} s after the request)"
            ) from error
        except ValidationError as error:
            raise EngineError(f"{self.name}: {path}: garbage in the answer: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{self.name}: {path}: connection lost: {error}") from error

    def _connected(
        self, method: str, path: str, body: bytes, idle_s: float
    ) -> http.client.HTTPResponse:
        """Send, trying again where no connection was made: the engine then saw nothing of it."""
        for attempt in range(1, CONNECT_ATTEMPTS + 1):
            try:
                return self._send(method, path, body, idle_s)
            except ConnectionRefusedError as error:
                if attempt == CONNECT_ATTEMPTS:
                    raise
                log.warning("%s: %s (attempt %d)", self.name, error, attempt)
                time.sleep(RETRY_PAUSE_S * attempt)
        raise AssertionError("unreachable")

    def _send(self, method: str, path: str, body: bytes, idle_s: float) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(
            self.address.host, self.address.port, timeout=CONNECT_TIMEOUT_S
        )
        try:
            self._connect(connection)
            connection.sock.settimeout(idle_s)
            connection.request(method, path, body, {"Authorization": f"Bearer {self.token}"})
            return connection.getresponse()
        except BaseException:
            # An engine stops working for a client as soon as the connection is closed.
            connection.close()
            raise

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        try:
            connection.connect()
        except TimeoutError as error:
            raise EngineTimeoutError(
                f"{self.name}: no connection in {CONNECT_TIMEOUT_S:g} s"
            ) from error


def _message(content: bytes) -> str:
    """The failure inside an answer, or its beginning when it is something else."""
    try:
        line = wire.LINE.validate_json(content)
    except ValidationError:
        return repr(content[:200])
    return line.message if isinstance(line, wire.Failure) else repr(line)
