"""Models behind OpenAI-compatible HTTP: bounded concurrency, retries, time limits, an account.

Retries are the openai client's own: timeouts, lost connections, 408, 409, 429 and 5xx, with its
exponential waits, or the endpoint's `Retry-After`.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NoReturn, TypeVar

import httpx2
import openai
from pydantic import Field, TypeAdapter, ValidationError

from megadistill.config.refine import EndpointConfig, ServedConfig
from megadistill.inference.requests import ChatRequest, ChatResponse, without_thinking

log = logging.getLogger(__name__)

Item = TypeVar("Item")

REFUSED = (400, 413, 422)
"""This request cannot be answered, others can."""
RETRIED = (408, 409, 429)
"""As every status from 500 on; other ones mean that no request can be answered."""
MOST_ALIVE = 1024
"""Coroutines alive at a time; far fewer have a request under way."""
MOST_WORDS = 200
"""Characters of what a model said that an error repeats."""
NO_KEY = "none"
"""The client wants some key, also where the endpoint wants none."""


@dataclass(frozen=True, slots=True)
class _Message:
    content: str


@dataclass(frozen=True, slots=True)
class _Choice:
    message: _Message
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class _Tokens:
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Completion:
    """The part of a chat completion that is read."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Tokens | None = None


_COMPLETION: TypeAdapter[_Completion] = TypeAdapter(_Completion)


class ChatError(ValueError):
    """This request has failed for good; others may do well. Its message is the reason."""


@dataclass(slots=True)
class Streak:
    """Failures of one sort in a row; too many of them end the work with the model's own words."""

    name: str
    length: int = 0
    sort: str = ""

    def end(self) -> None:
        """Something went well."""
        self.length = 0

    def go_on(self, sort: str, words: str, most: int) -> None:
        """One more of a sort ("requests in a row ..."). Raises `ValueError` when it is the last one."""
        self.length = self.length + 1 if sort == self.sort else 1
        self.sort = sort
        if self.length >= most:
            raise ValueError(
                f"models.{self.name}: {self.length} {sort}; the last: {words}. What is finished is "
                "kept: mend the endpoint or the request's settings and run this again"
            )


@dataclass(slots=True, kw_only=True)
class Usage:
    """Account of the requests to one model."""

    requests: int = 0
    """Sent, retries included."""
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: int = 0
    """Given up after every try, or refused."""
    unparsable: int = 0
    """Answers that could not be read, such as a judge's without a score."""


class _CheckedClient(openai.DefaultAsyncHttpxClient):
    """Makes of a try that takes too long in all, or is no chat completion, one that is retried."""

    def __init__(self, name: str, config: EndpointConfig | ServedConfig) -> None:
        # A user's proxy is for a user's endpoints: our own traffic, with its token, stays here.
        super().__init__(timeout=None, trust_env=isinstance(config, EndpointConfig))
        self._name = name
        self._timeout_s = config.timeout_s

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await super().send(request, **options)
            if response.is_success:
                # The openai client hands on whatever an endpoint says as if it were an answer.
                _COMPLETION.validate_json(response.content)
        except TimeoutError:
            problem = f"no answer in {self._timeout_s:g} s"
        except ValidationError as error:
            problem = f"an answer that is no chat completion: {error.errors()[0]['msg']}"
        except httpx2.RequestError as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            if response.is_error:
                log.warning("%s: status %d", self._name, response.status_code)
            return response
        log.warning("%s: %s", self._name, problem)
        raise httpx2.RequestError(problem, request=request)


@dataclass(slots=True)
class ChatModel:
    """One model; requests may come from many tasks of one event loop."""

    name: str
    model: str
    base_url: str
    key: str = field(repr=False)
    config: EndpointConfig | ServedConfig
    _client: openai.AsyncOpenAI = field(init=False)
    _slots: asyncio.Semaphore = field(init=False)
    _unanswered: Streak = field(init=False)
    _unread: Streak = field(init=False)

    def __post_init__(self) -> None:
        self._unanswered, self._unread = Streak(self.name), Streak(self.name)
        self._slots = asyncio.Semaphore(self.config.concurrency)
        self._client = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self.key,
            max_retries=self.config.tries - 1,
            timeout=None,
            http_client=_CheckedClient(self.name, self.config),
        )

    async def ask(self, request: ChatRequest, usage: Usage) -> ChatResponse:
        """The model's answer, after as many tries as it takes.

        Raises `ChatError` when this request cannot be answered, and `ValueError` when the
        endpoint cannot be used at all.
        """
        failure = None
        try:
            async with self._slots:
                response = await self._client.post(
                    "/chat/completions", body=self._body(request), cast_to=httpx2.Response
                )
            sent = response.request
        except openai.APIError as error:
            failure, sent = error, error.request
        retries = int(sent.headers["x-stainless-retry-count"])
        usage.requests += 1 + retries
        usage.retries += retries
        if failure is not None:
            usage.failed += 1
            self._give_up(failure)
        self._unanswered.end()
        completion = _COMPLETION.validate_json(response.content)
        if completion.usage is not None:
            usage.prompt_tokens += completion.usage.prompt_tokens
            usage.completion_tokens += completion.usage.completion_tokens
        choice = completion.choices[0]
        return ChatResponse(text=choice.message.content, cut=choice.finish_reason == "length")

    async def ask_until_parsed(
        self,
        requests: Iterable[ChatRequest],
        parse: Callable[[str], object],
        usage: Usage,
        *,
        give_up: bool = True,
    ) -> str:
        """The first answer, its thinking left out, of which `parse` makes something; else the last.

        `give_up`: whether many in a row of which it makes nothing end the work.
        """
        text = words = ""
        for request in requests:
            reply = await self.ask(request, usage)
            text = without_thinking(reply.text)
            if parse(text) is not None:
                self._unread.end()
                return text
            usage.unparsable += 1
            words = repr(reply.text[-MOST_WORDS:]) + (", which is cut" if reply.cut else "")
        if give_up:
            sort = "replies in a row could not be read"
            self._unread.go_on(sort, words, self.config.give_up_alike)
        return text

    def _body(self, request: ChatRequest) -> dict[str, Any]:
        """As the endpoint wants it (any: JSON)."""
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(request.messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            **({} if request.seed is None else {"seed": request.seed}),
            **self.config.extra_body,
        }
        # What OpenAI's interface has no name for goes along as vLLM calls it.
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.repetition_penalty != 1.0:
            body["repetition_penalty"] = sampling.repetition_penalty
        return body

    def _give_up(self, error: openai.APIError) -> NoReturn:
        problem = str(error.__cause__ or error)
        if isinstance(error, openai.APIStatusError):
            status, said = error.status_code, error.response.text[:MOST_WORDS]
            problem = f"status {status}: {said}"
            if status in REFUSED:
                log.warning("%s: refused: %s", self.name, said)
                sort = f"requests in a row were refused with status {status}"
                self._unanswered.go_on(sort, said, self.config.give_up_alike)
                raise ChatError("endpoint_refused") from error
            if status not in RETRIED and status < 500:
                raise ValueError(
                    f"models.{self.name}: the endpoint answered {status} ({said}); check "
                    "base_url, model and api_key_env"
                ) from error
        sort = f"requests in a row failed every one of {self.config.tries} tries"
        self._unanswered.go_on(sort, problem, self.config.give_up_after)
        raise ChatError("endpoint_failed") from error

    async def close(self) -> None:
        """Close its connections; it belongs to the event loop that has used it."""
        await self._client.close()


def open_endpoint(name: str, config: EndpointConfig) -> ChatModel:
    """A model that is served elsewhere."""
    key = NO_KEY
    if config.api_key_env is not None:
        if config.api_key_env not in os.environ:
            raise ValueError(f"models.{name}.api_key_env: {config.api_key_env} is not set")
        key = os.environ[config.api_key_env]
    return ChatModel(name, config.model, config.base_url, key, config)


def run_each(
    call: Callable[[Item], Awaitable[None]],
    items: Sequence[Item],
    models: Iterable[ChatModel],
    most: int = MOST_ALIVE,
) -> None:
    """Run a coroutine that asks these models for each item, `most` alive at a time.

    The first problem ends them all.
    """

    async def run() -> None:
        waiting = iter(items)

        async def work() -> None:
            for item in waiting:
                await call(item)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(most, len(items))):
                    group.create_task(work())
        except* ValueError as problems:
            raise problems.exceptions[0] from None
        finally:
            for model in models:
                await model.close()

    asyncio.run(run())


def cost_of(usage: Mapping[str, int], config: EndpointConfig | ServedConfig) -> float:
    """Price of what a model was asked; models that the shard serves cost nothing here."""
    if isinstance(config, ServedConfig):
        return 0.0
    prompt = usage["prompt_tokens"] * config.price_prompt
    return (prompt + usage["completion_tokens"] * config.price_completion) / 1e6
