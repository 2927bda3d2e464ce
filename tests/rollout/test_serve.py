import http.client
import threading
from collections.abc import Callable, Iterator

import pytest

from megadistill.rollout import wire
from megadistill.rollout.serve import EngineServer
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
        assert ask(port, "POST", "/generate", Content_Length="-1")[0] == 411


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
    server.shutdown()
    server.server_close()
    assert (status, str(raised[0])) == (500, "CUDA error")
    line = wire.LINE.validate_json(content)
    assert line == wire.Failure(message="RuntimeError: CUDA error")
