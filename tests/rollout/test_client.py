import socket
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from megadistill.config.schema import RolloutConfig
from megadistill.rollout import connection, wire
from megadistill.rollout.client import EnginePool
from megadistill.rollout.connection import EngineError, EngineTimeoutError
from megadistill.rollout.protocol import RolloutEngine
from megadistill.rundir import RunDir
from tests.rollout.fakes import (
    TOKEN,
    EchoEngine,
    address,
    free_port,
    pool_of,
    prompt,
    scripted,
    send,
    sequence,
    serving,
    wait_until,
    write_address,
)

NAMED = r"rollout engine 0 on node7 at 127\.0\.0\.1:\d+"


def generate_one(port: int, timeout_s: int = 5) -> None:
    pool_of(port, timeout_s=timeout_s).generate([prompt(1), prompt(2)], [0, 1], expected_version=0)


def test_rollouts_come_back_in_prompt_order_from_several_engines() -> None:
    first, second = EchoEngine(), EchoEngine()
    with serving(first) as port, serving(second) as other:
        engine: RolloutEngine = pool_of(port, other)
        prompts = [prompt(index, 7) for index in range(1, 6)]
        rollouts = engine.generate(prompts, list(range(5)), expected_version=0)
    assert [rollout.prompt for rollout in rollouts] == prompts
    assert [rollout.response_ids_R.tolist() for rollout in rollouts] == [
        [7, index] for index in range(1, 6)
    ]
    assert rollouts[0].logprobs_R.tolist() == [-0.5, -0.5]
    assert {rollout.policy_version for rollout in rollouts} == {0}


def test_the_cap_on_tokens_can_be_lowered_for_one_batch() -> None:
    with serving(EchoEngine()) as port:
        (rollout,) = pool_of(port).generate(
            [prompt(1, 2, 3)], [0], expected_version=0, max_tokens=2
        )
    assert rollout.response_ids_R.tolist() == [3, 2]


def test_an_empty_batch_asks_nobody() -> None:
    assert pool_of(free_port()).generate([], [], expected_version=0) == []


def test_as_many_seeds_as_prompts_are_expected() -> None:
    with pytest.raises(ValueError, match="found 1 seeds for 2 prompts"):
        pool_of(free_port()).generate([prompt(1), prompt(2)], [0], expected_version=0)


def test_a_wrong_token_is_refused() -> None:
    with serving(EchoEngine()) as port:
        wrong = pool_of(port, token="wrong")
        with pytest.raises(EngineError, match=f"{NAMED}.*missing or wrong token"):
            wrong.generate([prompt(1)], [0], expected_version=0)


def test_an_engine_with_other_weights_refuses_the_batch() -> None:
    with (
        serving(EchoEngine()) as port,
        pytest.raises(EngineError, match="found weights version 0, expected 4"),
    ):
        pool_of(port).generate([prompt(1)], [0], expected_version=4)


def test_a_rollout_of_another_version_is_an_error() -> None:
    with (
        scripted(lambda handler: send(handler, sequence(0), sequence(1, version=3))) as port,
        pytest.raises(EngineError, match=f"{NAMED}.*found weights version 3, expected 0"),
    ):
        generate_one(port)


def test_a_refused_request_says_why_and_leaves_the_engine_usable() -> None:
    with serving(EchoEngine()) as port:
        pool = pool_of(port)
        with pytest.raises(EngineError, match="request 1: only zeros"):
            pool.generate([prompt(1), prompt(0)], [0, 1], expected_version=0)
        assert len(pool.generate([prompt(1)], [0], expected_version=0)) == 1


def test_a_missing_sequence_is_an_error() -> None:
    with (
        scripted(lambda handler: send(handler, sequence(1), wire.End(count=1))) as port,
        pytest.raises(EngineError, match=r"without 1 of 2 sequences, e\.g\. \[0\]"),
    ):
        generate_one(port)


@pytest.mark.parametrize("end", [[], [wire.End(count=3)]])
def test_an_answer_that_does_not_end_as_it_should_is_an_error(end: list[wire.End]) -> None:
    lines: list[wire.Line] = [sequence(0), sequence(1), *end]
    with (
        scripted(lambda handler: send(handler, *lines)) as port,
        pytest.raises(EngineError, match=r"ended with .*, expected End\(count=2\)"),
    ):
        generate_one(port)


def test_a_doubled_sequence_is_an_error() -> None:
    with (
        scripted(lambda handler: send(handler, sequence(1), sequence(1))) as port,
        pytest.raises(EngineError, match="sequence 1 came twice"),
    ):
        generate_one(port)


def test_a_sequence_with_too_few_logprobs_is_an_error() -> None:
    short = wire.Sequence(id=0, token_ids=[1, 2], logprobs=[-1.0], finish_reason="stop", version=0)
    with (
        scripted(lambda handler: send(handler, short)) as port,
        pytest.raises(EngineError, match="found 2 tokens and 1 log-prob"),
    ):
        generate_one(port)


def test_a_garbage_line_is_an_error() -> None:
    with (
        scripted(lambda handler: send(handler, sequence(0), b"<html>\n")) as port,
        pytest.raises(EngineError, match=f"(?s){NAMED}.*garbage in the answer"),
    ):
        generate_one(port)


def test_an_engine_that_dies_midway_is_an_error() -> None:
    with (
        scripted(lambda handler: send(handler, sequence(0))) as port,
        pytest.raises(EngineError, match="without 1 of 2 sequences"),
    ):
        generate_one(port)


def test_a_failure_reported_midway_is_an_error() -> None:
    failure = wire.Failure(message="RuntimeError: out of memory")
    with (
        scripted(lambda handler: send(handler, sequence(0), failure)) as port,
        pytest.raises(EngineError, match=f"{NAMED}.*out of memory"),
    ):
        generate_one(port)


def test_a_silent_engine_times_out() -> None:
    def hang(handler: BaseHTTPRequestHandler) -> None:
        send(handler, sequence(0))
        time.sleep(3)

    with (
        scripted(hang) as port,
        pytest.raises(EngineTimeoutError, match=f"{NAMED}.*no answer for 1 s"),
    ):
        generate_one(port, timeout_s=1)


def test_an_engine_that_never_ends_times_out_although_it_is_alive() -> None:
    def alive(handler: BaseHTTPRequestHandler) -> None:
        send(handler)
        for _ in range(40):
            handler.wfile.write(wire.LINE.dump_json(wire.Alive(unfinished=2)) + b"\n")
            time.sleep(0.05)

    with (
        scripted(alive) as port,
        pytest.raises(EngineTimeoutError, match=f"{NAMED}.*took over 1 s"),
    ):
        generate_one(port, timeout_s=1)


def test_a_node_that_takes_no_connection_is_not_called_a_silent_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(connection, "CONNECT_RETRIES", 0)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as waiting:
        for _ in range(3):  # whom nobody accepts, so that the kernel takes no more
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        with pytest.raises(EngineTimeoutError, match=f"{NAMED}.*no connection in"):
            generate_one(listener.getsockname()[1])


def test_nobody_listening_is_tried_again_and_then_an_error() -> None:
    begun = time.monotonic()
    with pytest.raises(EngineError, match=f"{NAMED}.*connection lost.*refused"):
        generate_one(free_port())
    assert time.monotonic() - begun > 0.4


def test_an_engine_that_listens_a_little_later_is_found() -> None:
    port = free_port()
    answers: list[wire.Line] = [sequence(0), sequence(1), wire.End(count=2)]

    def begin() -> None:
        with scripted(lambda handler: send(handler, *answers), port):
            served.wait(5)

    served = threading.Event()
    threading.Timer(0.2, begin).start()
    generate_one(port)
    served.set()


def test_no_proxy_sees_what_is_asked_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(EchoEngine()) as port:
        assert pool_of(port).engines[0].health().version == 0
        assert len(pool_of(port).generate([prompt(1)], [0], expected_version=0)) == 1


def test_a_line_ends_at_a_newline_and_nowhere_else() -> None:
    failure = wire.Failure(message="one\u2028two\x0bthree\x85")
    with (
        scripted(lambda handler: send(handler, sequence(0), failure)) as port,
        pytest.raises(EngineError, match="one\u2028two\x0bthree\x85"),
    ):
        generate_one(port)


def test_one_failing_engine_stops_the_work_of_the_others() -> None:
    working = EchoEngine()
    failure = wire.Failure(message="broken")
    with serving(working) as port, scripted(lambda handler: send(handler, failure)) as other:
        with pytest.raises(EngineError, match="broken"):
            pool_of(port, other).generate([prompt(99), prompt(1)], [0, 1], expected_version=0)
        wait_until(lambda: working.cancellations == 1)


def test_publishing_reaches_every_engine_and_changes_the_version() -> None:
    first, second = EchoEngine(), EchoEngine()
    with serving(first) as port, serving(second) as other:
        pool = pool_of(port, other)
        pool.publish(3, [Path("a.safetensors")], "c0ffee")
        assert (first.version, second.version) == (3, 3)
        (rollout,) = pool.generate([prompt(1)], [0], expected_version=3)
        assert rollout.policy_version == 3
        assert pool.engines[1].health() == wire.Health(version=3, checksum="c0ffee", busy=False)


@pytest.mark.parametrize(
    "line",
    [
        wire.Loaded(version=3, checksum="other", seconds=0.1),
        wire.Loaded(version=2, checksum="c0ffee", seconds=0.1),
        wire.Done(),
    ],
)
def test_publishing_is_refused_unless_version_and_checksum_are_echoed(line: wire.Line) -> None:
    with (
        scripted(lambda handler: send(handler, line)) as port,
        pytest.raises(EngineError, match=NAMED),
    ):
        pool_of(port).publish(3, [Path("a.safetensors")], "c0ffee")


def test_sleep_and_wake_reach_the_engine_and_shutdown_ends_it() -> None:
    engine = EchoEngine()
    with serving(engine) as port:
        pool = pool_of(port)
        pool.sleep()
        pool.wake()
        pool.shutdown()
        assert engine.calls == ["sleep", "wake"]
        pool.shutdown()


def test_connecting_waits_until_every_engine_has_written_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    with serving(EchoEngine()) as port:
        write_address(run.engine_file(0), address(port))
        (tmp_path / "control" / "token").write_text(TOKEN)

        def sleep(_seconds: float) -> None:
            write_address(run.engine_file(1), address(port))

        monkeypatch.setattr("megadistill.rollout.client.time.sleep", sleep)
        pool = EnginePool.connect(run, RolloutConfig(engines=2))
    assert [engine.index for engine in pool.engines] == [0, 1]


def test_an_engine_that_does_not_come_up_is_named_with_its_log(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    log = run.log_file("engine-1", 0)
    log.parent.mkdir()
    log.touch()
    with serving(EchoEngine()) as port:
        write_address(run.engine_file(0), address(port))
        (tmp_path / "control" / "token").write_text(TOKEN)
        with pytest.raises(EngineTimeoutError) as raised:
            EnginePool.connect(run, RolloutConfig(engines=2, start_timeout_s=1))
    assert f"did not come up in 1 s: rollout engine 1 (log: {log})" in str(raised.value)


def test_an_engine_that_could_not_start_ends_the_waiting(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_address(run.engine_file(0), address(0, error="ValueError: no such model"))
    with pytest.raises(EngineError, match=r"engine 0 on node7 could not start: .*no such model"):
        EnginePool.connect(run, RolloutConfig())


def test_a_torn_address_file_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.engine_file(0).parent.mkdir()
    run.engine_file(0).write_text("{")
    with pytest.raises(EngineError, match=r"engine-0\.json is not an address"):
        EnginePool.connect(run, RolloutConfig())
