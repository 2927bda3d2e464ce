"""Models that answer by a script: an engine in this process, and a real HTTP endpoint."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from transformers import PreTrainedTokenizerBase

from megadistill.inference.requests import BatchRequest, BatchResponse, SamplingParams
from tests.tiny import Tree


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


@dataclass
class ScriptedEngine:
    """Writes `reply(prompt)` for each prompt; may be killed at a number of responses."""

    tokenizer: PreTrainedTokenizerBase
    reply: Callable[[str], str]
    prompts: list[str] = field(default_factory=list)
    sampling: list[SamplingParams] = field(default_factory=list)
    """Of each call."""
    kill_at: int | None = None

    def generate(
        self, requests: Iterable[BatchRequest], sampling: SamplingParams
    ) -> Iterator[BatchResponse]:
        self.sampling.append(sampling)
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


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible server that answers as its script says, one entry a request.

    A script is called with the request's number and its JSON, and returns the text of the answer,
    (status, body) or (status, body, headers) with its own, ("drip", "") for blanks without end, or
    a number of seconds to hang.
    """

    daemon_threads = True
    request_queue_size = 128
    """Connections that wait; beyond them the kernel resets some, which are retried and counted."""

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
        status, text, *headers = said if isinstance(said, tuple) else (200, completion(said))
        with self.server.lock:
            self.server.busy -= 1
        with contextlib.suppress(OSError):
            self.send(status, text, *headers)

    def send(self, status: int | str, text: str, headers: Mapping[str, str] | None = None) -> None:
        drips = status == "drip"
        self.send_response(200 if isinstance(status, str) else status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "1000" if drips else str(len(text.encode())))
        self.end_headers()
        while drips and not self.server.hung.wait(0.05):
            self.wfile.write(b" ")
            self.wfile.flush()
        self.wfile.write(text.encode())

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
