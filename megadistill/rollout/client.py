"""The training loop's side of all engines: deal prompts, gather rollouts, publish weights."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import ValidationError

from megadistill.config.schema import RolloutConfig
from megadistill.rollout import wire
from megadistill.rollout.connection import Connection, EngineError, EngineTimeoutError
from megadistill.rundir import RunDir
from megadistill.types import Prompt, Rollout

Value = TypeVar("Value")
Cancelled = Callable[[], bool]
"""Whether the answer is not wanted any more."""

IDLE_TIMEOUT_S = 300.0
"""Seconds without any sign of life after which a generating engine counts as hung."""

SHUTDOWN_TIMEOUT_S = 30.0
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class EnginePool:
    """All engines of a run; prompt i of a batch goes to engine i mod n."""

    engines: tuple[Connection, ...]
    config: RolloutConfig

    @classmethod
    def connect(cls, run: RunDir, config: RolloutConfig) -> "EnginePool":
        """Wait until every engine answers, at most `config.start_timeout_s` seconds.

        Raises `EngineError` when an engine reports that it could not start, `EngineTimeoutError`
        when one does not come up; both name the engine and its log.
        """
        begun = time.monotonic()
        found: dict[int, Connection] = {}
        while True:
            missing = [index for index in range(config.engines) if index not in found]
            for index in missing:
                if (connection := _try_connect(run, index)) is not None:
                    found[index] = connection
            missing = [index for index in missing if index not in found]
            if not missing:
                return cls(tuple(found[index] for index in range(config.engines)), config)
            if time.monotonic() - begun > config.start_timeout_s:
                raise EngineTimeoutError(_not_up(run, missing, config.start_timeout_s))
            time.sleep(POLL_S)

    def generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        expected_version: int,
        max_tokens: int | None = None,
    ) -> list[Rollout]:
        """One rollout for each prompt, in order; `max_tokens` defaults to the configured cap.

        Raises `EngineError` when an engine fails, holds other weights than `expected_version`,
        or leaves out or repeats a sequence; nothing is kept of a batch that failed.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"found {len(seeds)} seeds for {len(prompts)} prompts, expected equal")
        limit = self.config.max_tokens if max_tokens is None else max_tokens
        requests = [
            wire.Request(id=index, token_ids=list(prompt.token_ids), seed=seed, max_tokens=limit)
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        hands = [requests[index :: len(self.engines)] for index in range(len(self.engines))]
        answers = at_once(
            [
                partial(self._sample, engine, hand, expected_version)
                for engine, hand in zip(self.engines, hands, strict=True)
                if hand
            ]
        )
        gathered = {
            sequence.id: _rollout(prompts[sequence.id], sequence)
            for sequences in answers
            for sequence in sequences
        }
        return [gathered[index] for index in range(len(prompts))]

    def publish(self, version: int, files: Sequence[Path], checksum: str) -> None:
        """Load `files` into every engine; raises `EngineError` unless each echoes the checksum."""
        body = wire.Weights(version=version, files=[str(file) for file in files], checksum=checksum)
        for engine, line in self._ask_all("/weights", body):
            if not isinstance(line, wire.Loaded):
                raise EngineError(f"{engine.name}: /weights: found {line}, expected Loaded")
            if (line.version, line.checksum) != (version, checksum):
                raise EngineError(
                    f"{engine.name}: found weights version {line.version} with checksum "
                    f"{line.checksum}, expected {version} with {checksum}"
                )

    def sleep(self) -> None:
        """Let every engine give its GPU memory to the trainer."""
        self._ask_all("/sleep", wire.Empty())

    def wake(self) -> None:
        """Let every engine take its GPU memory back."""
        self._ask_all("/wake", wire.Empty())

    def shutdown(self) -> None:
        """Ask every engine to end; one that is gone already is no error."""
        timeout = SHUTDOWN_TIMEOUT_S
        for engine in self.engines:
            with suppress(EngineError):
                list(engine.ask("/shutdown", wire.Empty(), idle_s=timeout, total_s=timeout))

    def _ask_all(self, path: str, body: wire.Body) -> list[tuple[Connection, wire.Line | None]]:
        """The one line each engine answers, from all in parallel."""
        timeout = float(self.config.timeout_s)

        def ask(engine: Connection, cancelled: Cancelled) -> wire.Line | None:
            answer = engine.ask(path, body, idle_s=timeout, total_s=timeout, cancelled=cancelled)
            lines = list(answer)
            return lines[0] if len(lines) == 1 else None

        answers = at_once([partial(ask, engine) for engine in self.engines])
        return list(zip(self.engines, answers, strict=True))

    def _sample(
        self,
        engine: Connection,
        requests: list[wire.Request],
        version: int,
        cancelled: Cancelled,
    ) -> list[wire.Sequence]:
        """The sequences of one engine, each checked as it comes; raises `EngineError` unless it
        sends them all and says so."""
        sampling = wire.Sampling(
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            top_k=self.config.top_k,
        )
        body = wire.Generate(requests=requests, sampling=sampling, version=version)
        total_s = float(self.config.timeout_s)
        idle_s = min(IDLE_TIMEOUT_S, total_s)
        expected = {request.id for request in requests}
        sequences: list[wire.Sequence] = []
        last: wire.Line | None = None
        for last in engine.ask(
            "/generate", body, idle_s=idle_s, total_s=total_s, cancelled=cancelled
        ):
            if not isinstance(last, wire.Sequence):
                break
            _check(engine, last, expected, version)
            expected.remove(last.id)
            sequences.append(last)
        if expected:
            raise EngineError(
                f"{engine.name}: the answer ended without {len(expected)} of {len(requests)} "
                f"sequences, e.g. {sorted(expected)[:3]}"
            )
        if not isinstance(last, wire.End) or last.count != len(requests):
            raise EngineError(
                f"{engine.name}: the answer ended with {last}, expected End(count={len(requests)})"
            )
        return sequences


def at_once(calls: Sequence[Callable[[Cancelled], Value]]) -> list[Value]:
    """What the calls return, each made on a thread of its own; the first failure cancels the others."""
    finished: queue.Queue[tuple[int, Value | Exception]] = queue.Queue()
    cancelled = threading.Event()

    def make(index: int) -> None:
        try:
            finished.put((index, calls[index](cancelled.is_set)))
        except Exception as error:  # noqa: BLE001 - raised again by the caller's thread
            finished.put((index, error))

    for index in range(len(calls)):
        # No pool: a process would not end while one of its threads waits for an engine that hangs.
        threading.Thread(target=make, args=(index,), daemon=True).start()
    values: dict[int, Value] = {}
    try:
        while len(values) < len(calls):
            index, value = finished.get()
            if isinstance(value, Exception):
                raise value
            values[index] = value
    finally:
        cancelled.set()
    return [values[index] for index in range(len(calls))]


def _check(engine: Connection, line: wire.Sequence, expected: set[int], version: int) -> None:
    if line.id not in expected:
        raise EngineError(f"{engine.name}: sequence {line.id} came twice or was never asked for")
    if line.version != version:
        raise EngineError(
            f"{engine.name}: sequence {line.id}: found weights version {line.version}, "
            f"expected {version}"
        )
    if not line.token_ids or len(line.token_ids) != len(line.logprobs):
        raise EngineError(
            f"{engine.name}: sequence {line.id}: found {len(line.token_ids)} tokens and "
            f"{len(line.logprobs)} log-probabilities, expected equal and at least one"
        )


def _rollout(prompt: Prompt, sequence: wire.Sequence) -> Rollout:
    return Rollout(
        prompt=prompt,
        response_ids_R=np.asarray(sequence.token_ids, dtype=np.int32),
        logprobs_R=np.asarray(sequence.logprobs, dtype=np.float32),
        policy_version=sequence.version,
        finish_reason=sequence.finish_reason,
    )


def _try_connect(run: RunDir, index: int) -> Connection | None:
    """A connection to an engine that is up; None while it is not. Raises if it never will be."""
    file = run.engine_file(index)
    if not file.exists():
        return None
    hint = _log_hint(run, index)
    try:
        address = wire.EngineAddress.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise EngineError(f"rollout engine {index}: {file} is not an address: {error}") from error
    if address.error is not None:
        raise EngineError(
            f"rollout engine {index} on {address.node} could not start: {address.error}{hint}"
        )
    connection = Connection(index=index, address=address, token=run.token(), log_hint=hint)
    connection.health()
    return connection


def _log_hint(run: RunDir, index: int) -> str:
    """` (log: FILE)`, the newest log of that engine."""
    directory = run.log_file("engine", 0).parent
    logs = sorted(directory.glob(f"engine-{index}.*.log"), key=lambda file: file.stat().st_mtime)
    return f" (log: {logs[-1]})" if logs else f" (no log engine-{index}.*.log in {directory})"


def _not_up(run: RunDir, missing: Sequence[int], seconds: float) -> str:
    shown = itertools.islice(missing, 4)
    names = ", ".join(f"rollout engine {index}{_log_hint(run, index)}" for index in shown)
    return (
        f"{len(missing)} engine(s) did not come up in {seconds:g} s: {names}; "
        "see the log, or raise rollout.start_timeout_s"
    )
