"""Held-out divergences and likelihoods as columns: real small models, transformers as the oracle."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megadistill.config import ConfigError, EvaluateConfig, parse
from megadistill.evaluate import heldout_metrics
from megadistill.evaluate.requirements import without_missing
from megadistill.refine.blocks import read_rows_of
from megadistill.rollout.vllm_arguments import EngineSettings
from tests.evaluate.test_evaluation import World
from tests.inference.scripted import ScriptedEngine
from tests.tiny import Tree, make_tokenizer

WORDS = [f"word{number}" for number in range(40)]
SYSTEMS = ("instruct", "tuned")


def write_model(directory: Path, seed: int, words: list[str]) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words) + 5,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)  # type: ignore[no-untyped-call]
    make_tokenizer(words).save_pretrained(directory)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    for seed, name in enumerate(SYSTEMS):
        write_model(tmp_path / name, seed, WORDS)
    rows = [
        {"id": f"r{n}", "prompt": f"word{n} word{n + 1}", "answer": f"word{n % 7} word3"}
        for n in range(30)
    ]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = ScriptedEngine(make_tokenizer(WORDS), lambda prompt: "word1 word2 word9 word5")

    def start(_: EngineSettings) -> ScriptedEngine:
        return engine

    monkeypatch.setattr(heldout_metrics, "start_batch_engine", start)
    pool = {"kind": "file", "path": str(tmp_path / "pool.jsonl"), "answer": "answer"}
    texts = {"pool": "words", "teacher": "instruct", "max_tokens": 3}
    tree: Tree = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "device": "cpu",
        "systems": {
            name: {"kind": "serve", "path": str(tmp_path / name), "precision": "fp32"}
            for name in SYSTEMS
        },
        "benchmarks": {},
        "data": {"pools": {"words": {"sources": [pool]}}, "heldout_fraction": 0.4},
        "signals": {
            "kl": {"kind": "forward_kl", **texts},
            "back": {"kind": "reverse_kl", **texts},
            "nll": {"kind": "nll", "pool": "words"},
        },
    }
    return World(tmp_path, {"instruct": engine}, tree)


def oracle(world: World, system: str, text: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities over the vocabulary at each scored token, by transformers in fp32."""
    model = AutoModelForCausalLM.from_pretrained(world.path / system, dtype=torch.float32)
    ids = torch.tensor([text["token_ids"]])
    with torch.no_grad():
        logprobs: torch.Tensor = model(ids).logits[0].log_softmax(-1)
    return logprobs[-1 - text["num_scored"] : -1]


def texts_of(world: World, sampled: bool) -> list[dict[str, Any]]:
    files = (world.path / "runs/tiny/stages/texts").rglob(heldout_metrics.TEXTS)
    found = [read_rows_of(file) for file in files]
    (chosen,) = [rows for rows in found if (rows[0]["num_scored"] == 3) == sampled]
    return chosen


@pytest.mark.megatron
def test_every_text_has_the_value_that_transformers_gives(world: World) -> None:
    # The pool's answers have two words and the end token: cut to two to tell them from the others.
    world.tree["signals"]["nll"]["max_tokens"] = 2
    table = world.run()
    assert "KL(instruct ‖ system), words" in table
    sampled, own = texts_of(world, True), texts_of(world, False)
    kl = [row["value"] for row in world.results("tuned", "kl")]
    back = [row["value"] for row in world.results("tuned", "back")]
    nll = [row["value"] for row in world.results("tuned", "nll")]
    for number, text in enumerate(sampled):
        tuned, teacher = (oracle(world, name, text) for name in ("tuned", "instruct"))
        forward = (teacher.exp() * (teacher - tuned)).sum(-1).mean()
        reverse = (tuned.exp() * (tuned - teacher)).sum(-1).mean()
        assert kl[number] == pytest.approx(float(forward), abs=2e-5)
        assert back[number] == pytest.approx(float(reverse), abs=2e-5)
    for number, text in enumerate(own):
        ids = torch.tensor(text["token_ids"][-2:])
        expected = -oracle(world, "tuned", text).gather(1, ids[:, None]).mean()
        assert nll[number] == pytest.approx(float(expected), abs=2e-5)
    assert {row["value"] for row in world.results("instruct", "kl")} == {0.0}
    details = json.loads(world.results("tuned", "kl")[0]["details"])
    assert details == {
        "forward_kl": pytest.approx(kl[0]),
        "reverse_kl": pytest.approx(back[0]),
    }
    assert world.results("tuned", "nll")[0]["written"].startswith("word")


@pytest.mark.megatron
def test_less_is_better_and_the_columns_have_intervals_and_tests(world: World) -> None:
    world.run(baseline="tuned")
    found = list(csv.DictReader((world.path / "runs/tiny/report/table.csv").open()))
    by_place = {(row["system"], row["benchmark"]): row for row in found}
    tuned, exact = by_place["tuned", "kl"], by_place["instruct", "kl"]
    values = [row["value"] for row in world.results("tuned", "kl")]
    assert float(tuned["score"]) == pytest.approx(np.mean(values), abs=1e-4)
    assert 0 < float(tuned["low"]) < float(tuned["score"]) < float(tuned["high"])
    # All zeros are no proportion: the interval has no width.
    assert [float(exact[key]) for key in ("score", "low", "high")] == [0, 0, 0]
    assert exact["mark"] == "+"
    assert "**0.000 [0.000, 0.000] +**" in (world.path / "runs/tiny/report/table.md").read_text()


@pytest.mark.megatron
def test_two_signals_on_the_same_texts_have_them_written_once(world: World) -> None:
    world.run()
    assert world.runs == ["texts kl", "texts nll", "measure instruct", "measure tuned"]
    assert world.run()
    assert world.runs == []


def test_models_with_different_tokenizers_are_refused(world: World) -> None:
    write_model(world.path / "tuned", 1, [*WORDS, "more"])
    with pytest.raises(ValueError, match="tuned and instruct have different tokenizers"):
        world.run()


def test_wrong_names_are_said_at_once(world: World) -> None:
    wrong = {"a": {"kind": "nll", "pool": "p"}, "b": {"kind": "nll", "pool": "words"}}
    wrong["b"]["teacher"] = "nobody"
    with pytest.raises(ConfigError) as found:
        parse(EvaluateConfig, {**world.tree, "signals": wrong})
    assert "signals.a.pool: found 'p', expected one of ['words']" in str(found.value)
    assert "signals.b.teacher: found 'nobody'" in str(found.value)
    with pytest.raises(ConfigError, match="forward_kl needs one"):
        parse(
            EvaluateConfig,
            {**world.tree, "signals": {"c": {"kind": "forward_kl", "pool": "words"}}},
        )


def test_an_optional_benchmark_without_its_file_is_left_out(world: World) -> None:
    benchmarks = {"medqa": {"path": str(world.path / "none.jsonl"), "optional": True}}
    config = parse(EvaluateConfig, {**world.tree, "benchmarks": benchmarks})
    assert without_missing(config).benchmarks == {}
    with pytest.raises(ValueError, match="which does not exist"):
        world.run(benchmarks={"medqa": benchmarks["medqa"] | {"optional": False}})
