"""Models that a shard serves: started, found, and ended, with a small server in vLLM's place."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from megadistill.config.refine import EngineConfig, ServedConfig
from megadistill.inference import serving
from megadistill.inference.chat import Usage
from megadistill.inference.requests import ChatRequest, SamplingParams
from megadistill.inference.serving import HOST, open_models, serve_command, serve_environment
from megadistill.rollout.vllm_arguments import vllm_environment
from tests.inference.scripted import completion
from tests.tiny import write_model_config

SERVER = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self): self.answer(200, "")
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        known = self.headers["Authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]
        self.answer(200 if known else 401, sys.argv[2])
    def answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(text.encode())
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def stand_in(_: ServedConfig, name: str, port: int, *, gpu: bool) -> list[str]:
    assert not gpu
    if name == "broken":
        return [sys.executable, "-c", "raise SystemExit('no such weights')"]
    return [sys.executable, "-c", SERVER, str(port), completion(f"I am {name}")]


@pytest.fixture
def config(tmp_path: Path) -> ServedConfig:
    return ServedConfig(path=str(write_model_config(tmp_path / "model")), tries=1)


def test_models_are_served_for_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: ServedConfig
) -> None:
    monkeypatch.setattr(serving, "serve_command", stand_in)
    for proxy in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):  # no way for our own traffic
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    usage = Usage()

    async def ask() -> list[str]:
        request = ChatRequest(
            messages=[{"role": "user", "content": "?"}], sampling=SamplingParams(max_tokens=9)
        )
        answers = [(await model.ask(request, usage)).text for model in models.values()]
        for model in models.values():
            await model.close()
        return answers

    with open_models({"one": config, "two": config}, gpu=False, logs=tmp_path) as models:
        urls = [model.base_url for model in models.values()]
        assert asyncio.run(ask()) == ["I am one", "I am two"]
        assert all(url.startswith(f"http://{HOST}:") for url in urls)
    assert (usage.requests, usage.completion_tokens) == (2, 10)
    for url in urls:
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(url, timeout=5, trust_env=False)


def test_a_server_that_ends_is_reported_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: ServedConfig
) -> None:
    monkeypatch.setattr(serving, "serve_command", stand_in)
    models = {"one": config, "broken": config}
    with (
        pytest.raises(ValueError, match=r"(?s)models.broken: broken ended .*no such weights"),
        open_models(models, gpu=False, logs=tmp_path),
    ):
        pass


def test_commands_hold_no_secret_and_each_model_its_gpus(
    monkeypatch: pytest.MonkeyPatch, config: ServedConfig
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    two = ServedConfig(path=config.path, engine=EngineConfig(tp=2))
    words = serve_command(two, "judge", 1234, gpu=True)
    assert words[words.index("--tensor-parallel-size") + 1] == "2"
    assert words[words.index("--host") + 1] == "127.0.0.1"
    environment = serve_environment(two, "secret", (2, 3), gpu=True)
    assert environment["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in words
    words = serve_command(config, "judge", 1234, gpu=False)
    assert words[words.index("--dtype") + 1] == "bfloat16"
    assert {"--enforce-eager", "--no-enable-chunked-prefill"} < set(words)
    assert "secret" not in os.environ.values()


@pytest.mark.vllm
@pytest.mark.slow
def test_vllms_own_command_line_starts_under_its_name() -> None:
    command = [sys.executable, "-m", "megadistill.inference.vllm_serve", "--help"]
    environment = {**os.environ, **vllm_environment(1, gpu=False)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "vllm serve" in ended.stdout
