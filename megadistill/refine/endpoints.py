"""Models behind OpenAI-compatible HTTP: bounded concurrency, retries, time limits, an account."""

import asyncio
import logging
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Self

import openai
from pydantic import Field, TypeAdapter, ValidationError

from megadistill.config.refine import EndpointConfig, ServedConfig
from megadistill.types import Message

log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0
MISCONFIGURED = (401, 403, 404)
REFUSED = (400, 413, 422)
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
    """What is read of a chat completion."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Tokens | None = None


_COMPLETION: TypeAdapter[_Completion] = TypeAdapter(_Completion)


class RecordError(ValueError):
    """This request has failed for good; others may do well. Its message is the reason."""


@dataclass(slots=True, kw_only=True)
class Usage:
    """What one model was asked, and what it cost."""

    requests: int = 0
    """Sent, retries included."""
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: int = 0
    """Given up after every try."""
    unparsable: int = 0
    """Answers of a judge without a score."""

    def add(self, other: Self) -> None:
        for item in fields(self):
            total = getattr(self, item.name) + getattr(other, item.name)
            setattr(self, item.name, total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to write and how."""

    messages: Sequence[Message]
    temperature: float
    max_tokens: int
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What came back."""

    text: str
    cut: bool
    """Whether it ran into its cap."""


@dataclass(slots=True)
class ChatModel:
    """One model; requests may come from many tasks of one event loop."""

    name: str
    model: str
    client: openai.AsyncOpenAI
    config: EndpointConfig | ServedConfig
    _slots: asyncio.Semaphore = field(init=False)
    _failed_in_row: int = 0

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.config.concurrency)

    async def ask(self, asked: Asked, usage: Usage) -> Answered:
        """The model's answer, after as many tries as it takes.

        Raises `RecordError` when this request cannot be answered, and `ValueError` when the
        endpoint cannot be used at all.
        """
        problem = ""
        for number in range(self.config.tries):
            usage.retries += number > 0
            wait_s = _backoff(number)
            try:
                answered = await self._try(asked, usage)
            except openai.APIStatusError as error:
                self._check_status(error)
                problem = f"status {error.status_code}"
                wait_s = max(wait_s, _retry_after(error))
            except (TimeoutError, openai.APITimeoutError):
                problem = f"no answer in {self.config.timeout_s:g} s"
            except openai.APIError as error:
                problem = f"{type(error).__name__}: {error}"
            except ValidationError as error:
                problem = f"an answer that is no chat completion: {error.errors()[0]['msg']}"
            else:
                self._failed_in_row = 0
                return answered
            log.warning("%s: try %d: %s", self.name, number + 1, problem)
            if number + 1 < self.config.tries:
                await asyncio.sleep(wait_s)
        self._failed_in_row += 1
        if self._failed_in_row >= self.config.give_up_after:
            raise ValueError(
                f"models.{self.name}: {self._failed_in_row} requests in a row failed every one of "
                f"{self.config.tries} tries; the last: {problem}. What is finished is kept: mend "
                "the endpoint and run this again"
            )
        raise RecordError("endpoint_failed")

    async def _try(self, asked: Asked, usage: Usage) -> Answered:
        extra: dict[str, Any] = {} if asked.seed is None else {"seed": asked.seed}
        async with self._slots, asyncio.timeout(self.config.timeout_s):
            usage.requests += 1
            raw = await self.client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=[dict(message) for message in asked.messages],  # type: ignore[misc]
                temperature=asked.temperature,
                top_p=asked.top_p,
                max_tokens=asked.max_tokens,
                extra_body=self.config.extra_body or None,
                **extra,
            )
        # Read here, because the client hands on whatever an endpoint says as if it were an answer.
        completion = _COMPLETION.validate_json(raw.content)
        if completion.usage is not None:
            usage.prompt_tokens += completion.usage.prompt_tokens
            usage.completion_tokens += completion.usage.completion_tokens
        choice = completion.choices[0]
        return Answered(text=choice.message.content, cut=choice.finish_reason == "length")

    def _check_status(self, error: openai.APIStatusError) -> None:
        if error.status_code in MISCONFIGURED:
            raise ValueError(
                f"models.{self.name}: the endpoint answered {error.status_code} "
                f"({error.message[:200]}); check base_url, model and api_key_env"
            ) from error
        if error.status_code in REFUSED:
            log.warning("%s: refused: %s", self.name, error.message[:200])
            raise RecordError("endpoint_refused") from error


def _backoff(number: int) -> float:
    """Seconds before the next try: doubling, and spread so that many do not come back at once."""
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0**number) * random.uniform(0.5, 1.0)


def _retry_after(error: openai.APIStatusError) -> float:
    text = error.response.headers.get("retry-after", "")
    return min(float(text), LONGEST_WAIT_S) if text.isdecimal() else 0.0


def open_endpoint(name: str, config: EndpointConfig) -> ChatModel:
    """A client of a model that is served elsewhere."""
    key = NO_KEY
    if config.api_key_env is not None:
        if config.api_key_env not in os.environ:
            raise ValueError(f"models.{name}.api_key_env: {config.api_key_env} is not set")
        key = os.environ[config.api_key_env]
    return ChatModel(name, config.model, open_client(config.base_url, key), config)


def open_client(base_url: str, key: str) -> openai.AsyncOpenAI:
    """Without retries of its own: those are counted and logged here."""
    return openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=None)


def cost_of(usage: Mapping[str, int], config: EndpointConfig | ServedConfig) -> float:
    """Price of what a model was asked; models that the shard serves cost nothing here."""
    if isinstance(config, ServedConfig):
        return 0.0
    prompt = usage["prompt_tokens"] * config.price_prompt
    return (prompt + usage["completion_tokens"] * config.price_completion) / 1e6
