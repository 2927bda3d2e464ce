"""A refinement without vLLM: a scripted engine, shards in this process."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadistill.config import RefineConfig, parse
from megadistill.inference import templates
from megadistill.refine import diagnosing, rewriting, similarity
from megadistill.refine.pipeline import Pipeline
from megadistill.refine.similarity import Vectors
from megadistill.rollout.vllm_arguments import EngineSettings
from tests.inference.scripted import Killed, ScriptedEngine
from tests.launch.in_process import shards_in_process
from tests.tiny import Tree, make_tokenizer, write_model_config

FRUIT = ("apple", "banana", "cherry", "damson", "elder", "fig", "grape", "hazel", "iris", "jam")
PAIRS = [
    {"id": f"q{n}", "question": f"what is {name} ?", "answer": f"{name} is a plain thing"}
    for n, name in enumerate(FRUIT)
]


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


def echo_or_stray(prompt: str) -> str:
    """As `echo`, but of figs and irises something else is said."""
    text = echo(prompt)
    return "nothing of the sort" if {"fig", "iris"} & set(text.split()) else text


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
        with shards_in_process(self.runs):
            Pipeline(self.config(**changes), False).run()
        summary: dict[str, Any] = json.loads((self.root / "summary.json").read_text())
        return summary

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
    model = write_model_config(path / "model", vocab_size=200)
    template = (Path(templates.__file__).parent / "templates" / "rewrite-v1.txt").read_text()
    tokenizer = make_tokenizer([*lines, *json.dumps(rows).split('"'), template, "indeed"])
    tokenizer.save_pretrained(model)
    engine = ScriptedEngine(tokenizer, echo)

    def start(_: EngineSettings) -> ScriptedEngine:
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


def is_judged(body: dict[str, Any]) -> bool:
    """Whether a request is one to a judge."""
    return "<candidate>" in body["messages"][-1]["content"]
