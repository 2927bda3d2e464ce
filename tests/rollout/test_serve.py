import http.client
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import psutil
import pytest

from megadistill.rollout import serve, wire
from megadistill.rollout.connection import EngineError
from megadistill.rollout.serve import EngineServer, RequestError
from tests.rollout.fakes import TOKEN, EchoEngine, pool_of, prompt, serving, wait_until

GOOD = b'{"requests": [{"id": 0, "token_ids": [1], "seed": 0, "max_tokens": 1}],'
GOOD += b'"sampling": {"temperature": 1, "top_p": 1, "top_k": 0}, "version": 0}'


def ask(
    port: int, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    values = {"Authorization": f"Bearer {TOKEN}"}
    values |= {name.replace("_", "-"): value for name, value in headers.items()}
    link.request(method, path, body, values)
    with link.getresponse() as response:
        return response.status, response.read()


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer wrong", TOKEN, "Bearer rightt", "Bearer é"]
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("POST", "/shutdown")])
def test_without_the_token_nothing_is_answered(given: str, method: str, path: str) -> None:
    engine = EchoEngine()
    with serving(engine) as port:
        status, _ = ask(port, method, path, b"{}", Authorization=given)
        assert status == 401
        assert ask(port, "GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (GOOD, 200),
        (b"{", 400),
        (b"{}", 400),
        (GOOD.replace(b'"seed": 0', b'"seed": -1'), 400),
        (GOOD.replace(b"[1]", b"[]"), 400),
        (GOOD.replace(b'"temperature": 1', b'"temperature": 0'), 400),
        (GOOD.replace(b'"version"', b'"surprise": 1, "version"'), 400),
        (GOOD.replace(b'"version": 0', b'"version": 1'), 400),
    ],
)
def test_bodies_are_validated(body: bytes, status: int) -> None:
    with serving(EchoEngine()) as port:
        assert ask(port, "POST", "/generate", body)[0] == status


def test_unknown_paths_and_unbounded_bodies_are_refused() -> None:
    with serving(EchoEngine()) as port:
        assert ask(port, "GET", "/secrets")[0] == 404
        assert ask(port, "POST", "/secrets", b"{}")[0] == 404
        too_long = str(wire.MAX_BODY_BYTES + 1)
        assert ask(port, "POST", "/generate", Content_Length=too_long)[0] == 413
        assert ask(port, "POST", "/generate", Content_Length="-1")[0] == 400
        chunked = b"2\r\n{}\r\n0\r\n\r\n"
        assert ask(port, "POST", "/shutdown", chunked, Transfer_Encoding="chunked")[0] == 411


def test_health_answers_while_the_engine_is_busy() -> None:
    engine = EchoEngine()
    with serving(engine) as port:
        pool = pool_of(port)
        waiting = threading.Thread(
            target=pool.generate, args=([prompt(99)], [0]), kwargs={"expected_version": 0}
        )
        waiting.start()
        wait_until(lambda: pool.engines[0].health().busy)
        engine.gate.set()
        waiting.join(5)
        wait_until(lambda: not pool.engines[0].health().busy)


def test_a_client_that_leaves_stops_its_batch() -> None:
    engine = EchoEngine()
    with serving(engine) as port:
        body = GOOD.replace(b"[1]", b"[99]")
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        link.request("POST", "/generate", body, {"Authorization": f"Bearer {TOKEN}"})
        response = link.getresponse()
        response.readline()
        response.close()
        link.close()
        wait_until(lambda: engine.cancellations == 1)
        (rollout,) = pool_of(port).generate([prompt(5)], [0], expected_version=0)
        assert rollout.response_ids_R.tolist() == [5]


def test_an_engine_that_fails_tells_the_client_and_ends() -> None:
    class Broken(EchoEngine):
        def generate(
            self, body: wire.Generate, cancelled: Callable[[], bool]
        ) -> Iterator[wire.Sequence | wire.Alive | wire.End]:
            raise RuntimeError("CUDA error")

    server = EngineServer(Broken(), TOKEN, "127.0.0.1")
    raised: list[BaseException] = []

    def work() -> None:
        try:
            server.work()
        except RuntimeError as error:
            raised.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    status, content = ask(server.server_port, "POST", "/generate", GOOD)
    worker.join(5)
    assert (status, str(raised[0])) == (500, "CUDA error")
    line = wire.LINE.validate_json(content)
    assert line == wire.Failure(message="RuntimeError: CUDA error")


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "REQUEST_TIMEOUT_S", 0.2)
    with serving(EchoEngine()) as port, socket.create_connection(("127.0.0.1", port)) as link:
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        link.sendall(f"{head}Content-Length: 1000\r\n\r\nhalf".encode())
        link.settimeout(5)
        assert link.recv(1000).startswith(b"HTTP/1.1 408")
        assert ask(port, "GET", "/health")[0] == 200


def test_results_are_sent_as_they_finish_and_a_failure_is_the_last_line() -> None:
    class FailsLater(EchoEngine):
        def generate(
            self, body: wire.Generate, cancelled: Callable[[], bool]
        ) -> Iterator[wire.Sequence | wire.Alive | wire.End]:
            yield next(super().generate(body, cancelled))
            assert self.gate.wait(5)
            raise RequestError("no more")

    failing = FailsLater()
    with serving(failing) as port:
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        link.request("POST", "/generate", GOOD, {"Authorization": f"Bearer {TOKEN}"})
        with link.getresponse() as response:
            assert isinstance(wire.LINE.validate_json(response.readline()), wire.Sequence)
            failing.gate.set()
            assert response.status == 200
            rest = [wire.LINE.validate_json(line) for line in response.read().splitlines()]
        assert rest == [wire.Failure(message="no more", status=400)]


def test_a_signal_ends_an_engine_in_the_middle_of_a_batch() -> None:
    code = (
        "import signal, sys\n"
        "from megadistill.rollout.serve import EngineServer\n"
        "from tests.rollout.fakes import TOKEN, EchoEngine\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "server = EngineServer(EchoEngine(), TOKEN, '127.0.0.1')\n"
        "print(server.server_port, flush=True)\n"
        "server.work()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pool = pool_of(int(process.stdout.readline()))
    raised: list[EngineError] = []

    def generate() -> None:
        try:
            pool.generate([prompt(99)], [0], expected_version=0)
        except EngineError as error:
            raised.append(error)

    waiting = threading.Thread(target=generate)
    waiting.start()
    wait_until(lambda: pool.engines[0].health().busy)
    process.terminate()
    assert process.wait(10) == 143
    waiting.join(10)
    assert "connection lost" in str(raised[0])
    process.stdout.close()


def test_an_engine_listens_on_its_address_only() -> None:
    server = EngineServer(EchoEngine(), TOKEN, "127.0.0.1")
    connections = psutil.Process().net_connections("tcp")
    listening = [c.laddr.ip for c in connections if c.laddr.port == server.server_port]
    server.close()
    assert listening == ["127.0.0.1"]
