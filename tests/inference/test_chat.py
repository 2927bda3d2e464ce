"""Models behind real HTTP that answer well, badly, late, or not at all."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megadistill.config.refine import EndpointConfig
from megadistill.inference.chat import ChatError, ChatModel, Usage, open_endpoint, run_each
from megadistill.inference.requests import (
    ChatRequest,
    ChatResponse,
    SamplingParams,
    open_thought,
    without_thinking,
)
from tests.inference.scripted import Endpoint, completion, endpoint_tree

Serve = Callable[..., Endpoint]
REQUEST = ChatRequest(
    messages=[{"role": "user", "content": "What is it?"}], sampling=SamplingParams(max_tokens=9)
)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture
def serve() -> Iterator[Serve]:
    running: list[Endpoint] = []

    def start(script: Callable[[int, dict[str, Any]], Any]) -> Endpoint:
        running.append(Endpoint(script))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def ask(
    server: Endpoint, usage: Usage, request: ChatRequest = REQUEST, count: int = 1, **changes: Any
) -> list[ChatResponse | str]:
    """The answers to `count` equal requests, or the reason why there is none."""
    model = open_endpoint("strong", EndpointConfig(**endpoint_tree(server.url) | changes))
    found: list[ChatResponse | str] = []

    async def one(_: int) -> None:
        try:
            found.append(await model.ask(request, usage))
        except ChatError as error:
            found.append(str(error))

    run_each(one, range(count), [model])
    return found


def test_an_answer_and_what_it_cost(serve: Serve) -> None:
    server = serve(lambda *_: (200, completion("A fig", "length")))
    sampling = SamplingParams(
        temperature=0.5, top_p=0.9, top_k=20, repetition_penalty=1.05, max_tokens=7
    )
    request = ChatRequest(messages=REQUEST.messages, sampling=sampling, seed=5)
    usage = Usage()
    found = ask(server, usage, request, extra_body={"reasoning_effort": "low"})
    assert found == [ChatResponse(text="A fig", cut=True)]
    assert usage == Usage(requests=1, prompt_tokens=10, completion_tokens=5)
    assert server.bodies == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "What is it?"}],
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 20,
            "repetition_penalty": 1.05,
            "max_tokens": 7,
            "seed": 5,
            "reasoning_effort": "low",
        }
    ]
    ask(server, usage)
    assert server.bodies[1].keys() == {"model", "messages", "temperature", "top_p", "max_tokens"}


@pytest.mark.parametrize(
    "trouble",
    [
        (408, "slow"),
        (409, "locked"),
        (429, '{"error": {"message": "slow down"}}'),
        (500, "Internal Server Error"),
        (502, "<html>bad gateway</html>"),
        (200, "<html>hello</html>"),
        (200, '{"choices": []}'),
        (200, '{"choices": ["x"]}'),
        (200, '{"choices": [{"message": {"role": "assistant", "content": null}}]}'),
        (200, "[]"),
        (200, ""),
        10.0,
    ],
)
def test_a_troubled_answer_is_asked_for_again(serve: Serve, trouble: Any) -> None:
    server = serve(lambda number, body: trouble if number == 0 else "A fig")
    usage = Usage()
    limit_s = 1.5 if isinstance(trouble, float) else 30
    assert ask(server, usage, timeout_s=limit_s) == [ChatResponse(text="A fig", cut=False)]
    assert (usage.requests, usage.retries, usage.failed) == (2, 1, 0)


def test_the_time_limit_holds_for_an_endpoint_that_sends_something_all_the_time(
    serve: Serve,
) -> None:
    """Blanks keep the connection alive at some endpoints while a request waits in their queue."""
    server = serve(lambda number, body: ("drip", "") if number == 0 else "A fig")
    usage = Usage()
    begun = time.monotonic()
    assert ask(server, usage, timeout_s=0.5) == [ChatResponse(text="A fig", cut=False)]
    assert time.monotonic() - begun < 5
    assert usage.retries == 1


def test_an_endpoint_says_how_long_to_wait(serve: Serve) -> None:
    server = serve(
        lambda number, body: (429, "busy", {"Retry-After": "1"}) if number == 0 else "A fig"
    )
    begun = time.monotonic()
    assert ask(server, Usage()) == [ChatResponse(text="A fig", cut=False)]
    assert time.monotonic() - begun >= 1.0


def test_a_request_is_given_up_after_every_try(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(lambda *_: (500, "no"))
    usage = Usage()
    with caplog.at_level(logging.WARNING, "megadistill"):
        assert ask(server, usage, give_up_after=2) == ["endpoint_failed"]
    assert usage == Usage(requests=3, retries=2, failed=1)
    assert [record.message for record in caplog.records] == ["strong: status 500"] * 3


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_given_up_at_once(serve: Serve, status: int) -> None:
    server = serve(lambda *_: (status, '{"error": {"message": "context too long"}}'))
    usage = Usage()
    assert ask(server, usage) == ["endpoint_refused"]
    assert (len(server.bodies), usage) == (1, Usage(requests=1, failed=1))


def test_refusals_alike_in_a_row_end_the_work_with_the_endpoints_words(serve: Serve) -> None:
    server = serve(lambda *_: (400, "unknown parameter: top_k"))
    expected = (
        "models.strong: 8 requests in a row were refused with status 400; the last: unknown "
        "parameter: top_k. What is finished is kept"
    )
    with pytest.raises(ValueError, match=expected):
        ask(server, Usage(), count=20)
    server = serve(lambda number, body: "A fig" if number % 8 == 7 else (400, "too long"))
    found = ask(server, Usage(), count=32, concurrency=1)
    assert found.count("endpoint_refused") == 28
    with pytest.raises(ValueError, match="3 requests in a row were refused"):
        ask(server, Usage(), count=32, concurrency=1, give_up_alike=3)


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_an_endpoint_that_cannot_be_used_ends_the_work_at_once(serve: Serve, status: int) -> None:
    server = serve(lambda *_: (status, '{"error": {"message": "no such model"}}'))
    expected = rf"models.strong: the endpoint answered {status} \(.*no such model.*check base_url"
    with pytest.raises(ValueError, match=expected):
        ask(server, Usage())
    assert len(server.bodies) == 1


def test_a_dead_endpoint_ends_the_work_with_its_own_words(serve: Serve) -> None:
    server = serve(lambda *_: (503, "down for repair"))
    expected = "4 requests in a row failed every one of 3 tries; the last: status 503: down for rep"
    with pytest.raises(ValueError, match=expected):
        ask(server, Usage(), count=6, give_up_after=4)
    server.stop()
    expected = "1 requests in a row failed every one of 3 tries; the last: ConnectError"
    with pytest.raises(ValueError, match=expected):
        ask(server, Usage(), give_up_after=1)


def test_requests_under_way_are_bounded(serve: Serve) -> None:
    def slow(*_: Any) -> str:
        threading.Event().wait(0.02)
        return "A fig"

    server = serve(slow)
    assert len(ask(server, Usage(), count=12, concurrency=3)) == 12
    assert 1 < server.most_busy <= 3


def test_coroutines_alive_are_bounded() -> None:
    alive = most_alive = 0

    async def call(_: int) -> None:
        nonlocal alive, most_alive
        alive += 1
        most_alive = max(most_alive, alive)
        await asyncio.sleep(0)
        alive -= 1

    run_each(call, range(20), [], most=4)
    assert (alive, most_alive) == (0, 4)


def test_a_reply_that_cannot_be_read_is_asked_for_again(serve: Serve) -> None:
    replies = iter(["<think>7</think> I like it", "8", "no", "idea"])
    server = serve(lambda *_: next(replies))
    found: list[str] = []
    usage = Usage()

    async def score(model: ChatModel) -> None:
        requests = [
            ChatRequest(messages=REQUEST.messages, sampling=REQUEST.sampling, seed=seed)
            for seed in range(2)
        ]
        for _ in range(2):
            parse = {"8": 0}.get
            found.append(await model.ask_until_parsed(requests, parse, usage))

    model = open_endpoint("judge", EndpointConfig(**endpoint_tree(server.url)))
    run_each(score, [model], [model])
    assert found == ["8", "idea"]
    assert (usage.requests, usage.unparsable) == (4, 3)
    assert [body["seed"] for body in server.bodies] == [0, 1, 0, 1]


def test_thoughts_are_dropped() -> None:
    assert without_thinking("<think>well</think>\n\nRest. ") == "Rest."
    assert without_thinking("Rest.") == "Rest."
    assert without_thinking("<think>one</think> <think>two</think> Rest.") == "Rest."


def test_a_thought_that_never_ends_leaves_no_answer() -> None:
    assert without_thinking("<think>The answer is <score>1</score>") == ""
    assert without_thinking("<think>one</think> <think>two") == ""
    assert without_thinking("Rest. <think>but") == "Rest."
    assert without_thinking(open_thought("<|assistant|>\n<think>\n", "I wonder")) == ""
    assert without_thinking(open_thought("<|assistant|>\n<think>\n", "So.</think> Yes")) == "Yes"
    assert without_thinking(open_thought("<|assistant|>\n", "Yes")) == "Yes"


def test_the_key_comes_from_the_environment(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(lambda *_: "A fig")
    with pytest.raises(ValueError, match="TEST_FUSION_KEY is not set"):
        ask(server, Usage(), api_key_env="TEST_FUSION_KEY")
    monkeypatch.setenv("TEST_FUSION_KEY", "secret")
    ask(server, Usage(), api_key_env="TEST_FUSION_KEY")
    assert server.headers[0]["authorization"] == "Bearer secret"
    model = open_endpoint("strong", EndpointConfig(base_url=server.url, model="m"))
    assert "none" not in repr(model)
