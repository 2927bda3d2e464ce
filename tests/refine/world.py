"""A refinement without vLLM: a scripted engine, a scripted endpoint, shards in this process."""

import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from megadistill.config import RefineConfig, parse
from megadistill.launch.fanout import FanoutResult, Limits, Shard
from megadistill.launch.shards import ShardFolder, run_shard
from megadistill.refine import diagnosing, rewriting, similarity
from megadistill.refine.pipeline import Pipeline
from megadistill.refine.similarity import Vectors
from megadistill.rollout.batch import BatchRequest, BatchResponse, BatchSettings, Sampling
from tests.tiny import make_tokenizer, write_model_config

Tree = dict[str, Any]  # a configuration before it is validated
FRUIT = ("apple", "banana", "cherry", "damson", "elder", "fig", "grape", "hazel", "iris", "jam")
PAIRS = [
    {"id": f"q{n}", "question": f"what is {name} ?", "answer": f"{name} is a plain thing"}
    for n, name in enumerate(FRUIT)
]


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


@dataclass
class ScriptedEngine:
    """Writes `reply(prompt)` for each prompt; may be killed at a number of responses."""

    tokenizer: PreTrainedTokenizerBase
    reply: Callable[[str], str]
    prompts: list[str] = field(default_factory=list)
    kill_at: int | None = None

    def generate(
        self, requests: Iterable[BatchRequest], sampling: Sampling
    ) -> Iterator[BatchResponse]:
        for request in requests:
            if self.kill_at is not None and len(self.prompts) >= self.kill_at:
                raise Killed
            prompt = str(self.tokenizer.decode(list(request.token_ids)))
            self.prompts.append(prompt)
            ids = self.tokenizer.encode(self.reply(prompt), add_special_tokens=False)
            yield BatchResponse(
                key=request.key,
                token_ids=ids[: sampling.max_tokens],
                finish_reason="length" if len(ids) > sampling.max_tokens else "stop",
            )

    def mean_nll(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[float]:
        return [0.1 * num_scored for _, num_scored in sequences]

    def close(self) -> None:
        return


class WordEncoder:
    """Counts of words, so that similarities can be computed by hand; a token is a word."""

    window = 8
    kill_at: int | None = None

    def __init__(self, *_: Any, **__: Any) -> None:
        self.texts: list[str] = []

    def offsets(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in re.finditer(r"\S+", text)]

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.texts += texts
        if WordEncoder.kill_at is not None and len(self.texts) > WordEncoder.kill_at:
            raise Killed
        vectors = np.zeros((len(texts), 512))
        for number, text in enumerate(texts):
            for word in text.split():
                vectors[number, sum(word.encode()) % 512] += 1
        return vectors


def echo(prompt: str) -> str:
    """The answer in the prompt of rewriting, with a word before it; without one, some words."""
    found = re.search(r"answer:(.*?)Using the", prompt, re.DOTALL)
    return f"indeed {found[1].strip()}" if found else "indeed a plain thing"


@dataclass
class World:
    """One refinement's files and engine."""

    path: Path
    engine: ScriptedEngine
    tree: Tree
    runs: list[str] = field(default_factory=list)
    """Labels of the shards that were run."""

    def config(self, **changes: Any) -> RefineConfig:
        return parse(RefineConfig, {**self.tree, **changes})

    def run(self, **changes: Any) -> dict[str, Any]:
        self.runs.clear()
        pipeline = Pipeline(self.config(**changes), False, run_shards=self.run_shards)
        return pipeline.run()

    def run_shards(
        self, root: Path, shards: Sequence[Shard], limits: Limits, **_: Any
    ) -> FanoutResult:
        """As `run_fanout`, in this process."""
        states = []
        for shard in shards:
            folder = ShardFolder.of(root, shard)
            if not folder.done_file.exists():
                self.runs.append(shard.label)
                folder.create(shard)
                with mock.patch.dict(os.environ):  # which a shard sets up for itself
                    run_shard(folder.path)
            states.append(folder.state(shard.name, limits.tries))
        return FanoutResult(shards=tuple(states))

    @property
    def root(self) -> Path:
        return self.path / "runs" / "tiny"

    def refined(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / "refined.jsonl").open()]


def make_world(
    path: Path, patch: pytest.MonkeyPatch, rows: Sequence[Any] = PAIRS, **changes: Any
) -> World:
    """Rows of JSON (or text, for lines that are none) as the input, and what a run needs."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (path / "input.jsonl").write_text("\n".join(lines) + "\n")
    model = write_model_config(path / "model")
    template = (Path(rewriting.__file__).parent / "templates" / "rewrite-v1.txt").read_text()
    tokenizer = make_tokenizer([*lines, *json.dumps(rows).split('"'), template, "indeed"])
    tokenizer.save_pretrained(model)
    engine = ScriptedEngine(tokenizer, echo)

    def start(_: BatchSettings) -> ScriptedEngine:
        return engine

    patch.setattr(rewriting, "start_batch_engine", start)
    patch.setattr(diagnosing, "start_batch_engine", start)
    patch.setattr(similarity, "SentenceEncoder", WordEncoder)
    patch.setattr(diagnosing, "SentenceEncoder", WordEncoder)
    patch.setattr(WordEncoder, "kill_at", None)
    tree: Tree = {
        "name": "tiny",
        "runs_dir": str(path / "runs"),
        "device": "cpu",
        "input": {"path": str(path / "input.jsonl")},
        "rewrite": {"model": str(model), "max_tokens": 64, "max_prompt_tokens": 256},
        "diagnose": None,
        "shards": {"count": 2, "block": 2},
    }
    return World(path, engine, tree | changes)


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible server that answers as its script says, one entry a request.

    A script is called with the request's number and its JSON, and returns the text of the answer,
    (status, body) with its own, or a number of seconds to hang.
    """

    daemon_threads = True

    def __init__(self, script: Callable[[int, dict[str, Any]], Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.hung = threading.Event()
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def stop(self) -> None:
        self.hung.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
        said = self.server.script(number, body)
        if isinstance(said, float):
            self.server.hung.wait(said)
            said = (503, "too late")
        status, text = said if isinstance(said, tuple) else (200, completion(said))
        with self.server.lock:
            self.server.busy -= 1
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())
        except OSError:
            return

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def completion(text: str, finish_reason: str = "stop") -> str:
    """A chat completion's JSON."""
    message = {"role": "assistant", "content": text}
    return json.dumps(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "scripted",
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        }
    )


def endpoint_tree(url: str, **changes: Any) -> Tree:
    """An endpoint for `models`, quick to give up."""
    return {"kind": "endpoint", "base_url": url, "model": "m", "tries": 3, "timeout_s": 5} | changes


def is_judged(body: dict[str, Any]) -> bool:
    """Whether a request is one to a judge."""
    return "<candidate>" in body["messages"][-1]["content"]
