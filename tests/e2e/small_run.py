"""A whole run on models small enough for tests: real Megatron-Core, real vLLM, real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from megadistill.metrics import read_metrics
from megadistill.rundir import RunDir
from tests.tiny import Tree, camopd_tree, make_tokenizer

RUN_TIMEOUT_S = 560.0
WORDS = [f"word{index}" for index in range(200)]


def make_models(directory: Path) -> None:
    """`directory/general` and `directory/domain`: two unlike models with one tokenizer."""
    torch.manual_seed(0)
    model = make_model()
    for name in ("general", "domain"):
        save_model(model, directory / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))


def make_model(*, hidden_size: int = 64, num_layers: int = 4) -> LlamaForCausalLM:
    """Random weights over the words."""
    tokenizer = make_tokenizer([" ".join(WORDS)])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        head_dim=32,  # the smallest that vLLM runs on a CPU
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


def save_model(model: LlamaForCausalLM, directory: Path) -> None:
    """Weights, configuration and the tokenizer of the words."""
    model.save_pretrained(directory)
    make_tokenizer([" ".join(WORDS)]).save_pretrained(directory)


def write_prompts(file: Path, first_word: int) -> None:
    """Thirty prompts of eight words."""
    lines = []
    for index in range(30):
        words = [WORDS[(first_word + 7 * index + 3 * place) % len(WORDS)] for place in range(8)]
        lines.append(f'{{"id": "{file.stem}-{index}", "prompt": "{" ".join(words)}"}}\n')
    file.write_text("".join(lines))


def write_run(directory: Path, name: str, **changes: Any) -> Path:
    """A configuration file of a four-step fp32 CaMOPD run on the models in `directory`."""
    for pool, first_word in (("general", 0), ("medical", 50)):
        write_prompts(directory / f"{pool}.jsonl", first_word)
    teachers = {name: {"path": str(directory / name)} for name in ("general", "domain")}
    pools = {
        pool: {"sources": [{"kind": "file", "path": str(directory / f"{pool}.jsonl")}]}
        for pool in ("general", "medical")
    }
    algorithm: Tree = {
        "kind": "camopd",
        "schedule": {"general": 1, "domain": 1},
        "general": {"pool": "general", "teacher": "general", "scale": 2.0},
        "domain": {"pool": "medical", "teacher": "domain"},
    }
    tree = camopd_tree(
        name=name,
        runs_dir=str(directory / "runs"),
        precision="fp32",
        student=teachers["domain"],
        teachers=teachers,
        algorithm=algorithm,
        data={"max_prompt_tokens": 64, "heldout_fraction": 0.2, "pools": pools},
        batch={"size": 4, "micro_batch_tokens": 64},
        optimizer={"lr": 1e-3},
        rollout={"max_tokens": 8, "max_num_seqs": 8},
        evaluate={
            "every": 2,
            "heldout": {
                "general": {"pool": "general", "teacher": "general", "prompts": 2, "max_tokens": 6}
            },
        },
        checkpoint={"every": 1, "keep": 2},
    )
    file = directory / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree | changes))
    return file


def start(command: Sequence[str]) -> "subprocess.Popen[str]":
    """A command in a process group of its own, its output kept."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def train_command(config: Path) -> list[str]:
    return [sys.executable, "-m", "megadistill", "train", str(config)]


def finish(process: "subprocess.Popen[str]", timeout_s: float = RUN_TIMEOUT_S) -> str:
    """Wait for success and return the output; a failure shows it."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s:\n{output[-4000:]}") from None
    assert process.returncode == 0, output[-4000:]
    return output


def kill_when(
    process: "subprocess.Popen[str]", reached: Callable[[], bool], timeout_s: float = RUN_TIMEOUT_S
) -> None:
    """SIGKILL the launcher at the moment; its roles must die with it."""
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert process.poll() is None, (
            f"ended before it could be killed:\n{process.communicate()[0]}"
        )
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.005)
    process.kill()
    process.communicate()


def losses(run: RunDir) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step, as exact floats."""
    rows = read_metrics(run.metrics_file)
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if row["step"]]
