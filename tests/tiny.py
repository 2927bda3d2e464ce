"""Small real things that many tests share: rollouts, a run's settings, a tokenizer, a model's files.

Shape legend: R response tokens.
"""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from megadistill.algorithms import Mopd, make_algorithm
from megadistill.algorithms.schedules import Cycle
from megadistill.config import RunConfig, parse
from megadistill.config.algorithm import CamopdConfig
from megadistill.types import FloatArray, Prompt, Rollout, Scored, TokenScores

Tree = dict[str, Any]  # a configuration before it is validated

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> "
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Every part stands between spaces, so that the word-level tokenizer below sees it whole."""

SPECIAL_TOKENS = ("<unk>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def float32(values: npt.ArrayLike) -> FloatArray:
    return np.asarray(values, dtype=np.float32)


def make_prompt(prompt_id: str = "p", pool: str = "general", answer: str | None = None) -> Prompt:
    return Prompt(
        id=prompt_id,
        pool=pool,
        messages=({"role": "user", "content": f"question {prompt_id}"},),
        token_ids=(11, 12, 13),
        answer=answer,
    )


def make_rollout(
    logprobs_R: Sequence[float],
    *,
    prompt: Prompt | None = None,
    policy_version: int = 0,
    finish_reason: Literal["stop", "length"] = "stop",
) -> Rollout:
    """A response of as many tokens as it has log-probabilities."""
    return Rollout(
        prompt=prompt or make_prompt(),
        response_ids_R=np.arange(20, 20 + len(logprobs_R), dtype=np.int32),
        logprobs_R=float32(logprobs_R),
        policy_version=policy_version,
        finish_reason=finish_reason,
    )


def make_scored(
    student_R: Sequence[float],
    teacher_R: Sequence[float],
    *,
    rollout_R: Sequence[float] | None = None,
    branch: str = "general",
    prompt_id: str = "p",
) -> Scored:
    """A scored rollout; without `rollout_R` the rollout engine agreed with the trainer."""
    logprobs_R = student_R if rollout_R is None else rollout_R
    return Scored(
        rollout=make_rollout(logprobs_R, prompt=make_prompt(prompt_id, pool=branch)),
        branch=branch,
        student=TokenScores(logprobs_R=float32(student_R)),
        teacher=TokenScores(logprobs_R=float32(teacher_R)),
    )


def camopd_tree(**changes: Any) -> Tree:
    """The smallest CaMOPD run; `changes` replace whole top-level sections."""
    tree: Tree = {
        "name": "tiny",
        "steps": 4,
        "device": "cpu",
        "student": {"path": "cache:domain"},
        "teachers": {"general": {"path": "cache:general"}, "domain": {"path": "cache:domain"}},
        "algorithm": {
            "kind": "camopd",
            "general": {"pool": "general", "teacher": "general", "scale": 2.0},
            "domain": {"pool": "medical", "teacher": "domain"},
        },
        "data": {
            "max_prompt_tokens": 64,
            "pools": {
                "general": {"sources": [{"kind": "packaged", "name": "general"}]},
                "medical": {
                    "template": "medical",
                    "sources": [{"kind": "packaged", "name": "medical"}],
                },
            },
        },
        "batch": {"size": 4},
        "rollout": {"max_tokens": 16},
        "log": {"wandb": "off"},
    }
    return tree | changes


def sft_tree(**changes: Any) -> Tree:
    """The smallest SFT run."""
    tree = camopd_tree(algorithm={"kind": "sft", "pool": "medical"}, teachers={})
    del tree["rollout"]
    return tree | changes


def make_config(tree: Tree | None = None) -> RunConfig:
    return parse(RunConfig, camopd_tree() if tree is None else tree)


def raft_tree(**changes: Any) -> Tree:
    """The smallest RAFT run; `changes` replace whole top-level sections."""
    raft = {"kind": "raft", "pool": "medical", "teacher": "general", "top_k": 3}
    return camopd_tree(algorithm=raft) | changes


def decisions(tree: Tree | None = None, state: Mapping[str, float] | None = None) -> Any:
    """The algorithm of a configuration, whichever it is."""
    return make_algorithm(make_config(tree), make_tokenizer(["a b c"]), state or {})


def camopd_of(config: CamopdConfig) -> Mopd:
    """CaMOPD's decisions without the rest of a run."""
    return Mopd(config=config, schedule=Cycle([{"general": 1}]), seed=0, num_steps=1)


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token a word of `texts`, and a chat template; nothing is downloaded."""
    words = sorted({word for text in texts for word in text.split()} - set(SPECIAL_TOKENS))
    ids = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *words])}
    backend = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_bpe_tokenizer(controls: Sequence[str], **settings: Any) -> PreTrainedTokenizerFast:
    """Bytes, a few merges, and control tokens that are no tokens of the vocabulary, as real ones."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the end of the turn and the start im_end im_start"], trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, **settings
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(controls)})
    return tokenizer


def write_model_config(directory: Path, **changes: Any) -> Path:
    """`config.json` of a small Llama, without weights."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 100,
        "max_position_embeddings": 256,
    }
    (directory / "config.json").write_text(json.dumps(settings | changes), encoding="utf-8")
    return directory


def write_model(directory: Path, **changes: Any) -> Path:
    """The same with a tokenizer, a chat template and a file of weights, of one tensor."""
    write_model_config(directory, **changes)
    save_file({"weight": np.zeros(1, np.float32)}, directory / "model.safetensors")
    make_tokenizer(["a b c"]).save_pretrained(directory)
    return directory


def set_today(patch: pytest.MonkeyPatch, day: str) -> None:
    """The day on which whatever begins from here begins."""

    class Day(datetime.date):
        @classmethod
        def today(cls) -> Self:
            return cls.fromisoformat(day)

    patch.setattr("megadistill.config.loading.datetime", SimpleNamespace(date=Day))
