"""A shard of tests that serves two models: a small server in the place of vLLM's."""

import os
import sys
from pathlib import Path

from megadistill.config.refine import ServedConfig
from megadistill.inference import serving
from megadistill.launch.shards import ShardArguments

SERVER = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from megadistill.inference.vllm_serve import follow_asker
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
follow_asker()
Path(sys.argv[2]).write_text(f"{os.getpid()} {os.environ['SLURM_STEP_ID']}")
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class ServeArguments(ShardArguments):
    model: str


def serve_two(directory: Path, arguments: ServeArguments) -> None:
    """Serve two models; the first try dies in their midst."""
    seen: dict[str, Path] = {}

    def command(config: ServedConfig, name: str, port: int, *, gpu: bool) -> list[str]:
        return [sys.executable, "-c", SERVER, str(port), str(seen[name])]

    first = not list(directory.glob("*.0"))
    for name in ("fusion", "judge"):
        seen[name] = directory / f"{name}.{0 if first else 1}"
    serving.serve_command = command
    model = ServedConfig(path=arguments.model)
    with serving.open_models(dict.fromkeys(seen, model), gpu=False, logs=directory):
        if first:
            os.kill(os.getpid(), 9)
