"""Start-up checks that fail closed: each says the number found and the number allowed."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megadistill.config import ConfigError, RunConfig, resolve_path
from megadistill.config.schema import BranchConfig, ChecksConfig
from megadistill.convert.families import ModelSpec, read_spec
from megadistill.data.pools import PromptPool, end_token
from megadistill.rundir import RunDir
from megadistill.types import FloatArray, TokenSpan

NUM_PROBE_PROMPTS = 2
"""Domain prompts scored by student and domain teacher before the first step."""

MAX_PROBE_TOKENS = 32
"""Scored tail of a probe prompt."""


def check_config(config: RunConfig) -> None:
    """Everything that can be known without a GPU or a model in memory.

    Raises `ConfigError` with all problems, each with its key.
    """
    problems: list[str] = []
    specs: dict[str, ModelSpec] = {}
    for key, path in model_paths(config).items():
        directory = Path(resolve_path(path))
        if not directory.is_dir():
            if not _is_hub_name(path):
                problems.append(f"{key}.path: found {str(directory)!r}, which does not exist")
            continue
        try:
            specs[key] = read_spec(directory)
        except ValueError as error:
            problems.append(f"{key}.path: {error}")
    for key, spec in specs.items():
        problems += _parallel_problems(key, spec, config)
    problems += _length_problems(specs, config)
    problems += [*_vocabulary_problems(specs, config), *_disk_problems(config)]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{config.name}: {len(problems)} problem(s)\n{lines}")


def model_paths(config: RunConfig) -> dict[str, str]:
    """Dotted key -> path of every model the run loads."""
    teachers = {f"teachers.{name}": model.path for name, model in config.teachers.items()}
    return {"student": config.student.path, **teachers}


def _is_hub_name(path: str) -> bool:
    """`org/name` is looked up on the hub; anything else must be a directory."""
    return path.count("/") == 1 and path[0] not in "./~$" and not path.startswith("cache:")


def _parallel_problems(key: str, spec: ModelSpec, config: RunConfig) -> list[str]:
    tp, pp = config.parallel.tp, config.parallel.pp
    divisors = {
        "attention heads": (spec.num_heads, "tp", tp),
        "key/value heads": (spec.num_kv_heads, "tp", tp),
        "feed-forward units": (spec.ffn_size, "tp", tp),
        "layers": (spec.num_layers, "pp", pp),
    }
    return [
        f"parallel.{name}: found {size}, expected a divisor of the {count} {what} of {key}"
        for what, (count, name, size) in divisors.items()
        if count % size
    ]


def _length_problems(specs: Mapping[str, ModelSpec], config: RunConfig) -> list[str]:
    if config.rollout is None:
        return []
    needed = config.data.max_prompt_tokens + config.rollout.max_tokens
    room = config.rollout.max_model_len or needed
    problems = [
        f"{key}: its context is {spec.max_positions} tokens, expected at least {room} "
        "(data.max_prompt_tokens + rollout.max_tokens)"
        for key, spec in specs.items()
        if spec.max_positions < room
    ]
    if room < needed:
        problems.append(f"rollout.max_model_len: found {room}, expected at least {needed}")
    return problems


def _vocabulary_problems(specs: Mapping[str, ModelSpec], config: RunConfig) -> list[str]:
    """A divergence over the full vocabulary needs as many rows on both sides."""
    sizes = {key: spec.vocab_size for key, spec in specs.items()}
    return [
        f"evaluate.heldout.{name}.teacher: teachers.{heldout.teacher} has {sizes[teacher]} "
        f"vocabulary rows, expected {sizes['student']} like the student"
        for name, heldout in config.evaluate.heldout.items()
        if (teacher := f"teachers.{heldout.teacher}") in sizes
        and sizes[teacher] != sizes.get("student", sizes[teacher])
    ]


def _disk_problems(config: RunConfig) -> list[str]:
    folder = Path(config.runs_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free_gib = shutil.disk_usage(folder).free / 2**30
    if free_gib < config.checks.min_free_gib:
        limit = config.checks.min_free_gib
        return [
            f"runs_dir: {free_gib:.1f} GiB are free at {folder}, checks.min_free_gib is {limit}"
        ]
    return []


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The student's tokenizer, after checking that the teachers read its ids the same way.

    Raises `ConfigError` on a missing chat template or end token, or on any id that two models
    map to different text: distillation compares probabilities id by id.
    """
    student = _tokenizer(config.student.path)
    if not student.chat_template:
        raise ConfigError(f"student.path: {config.student.path} has no chat template")
    end_token(student)
    vocabulary = student.get_vocab()
    for name, model in config.teachers.items():
        other = _tokenizer(model.path).get_vocab()
        if other == vocabulary:
            continue
        differing = {
            token
            for token in vocabulary.keys() | other.keys()
            if vocabulary.get(token) != other.get(token)
        }
        examples = ", ".join(repr(token) for token in sorted(differing)[:5])
        raise ConfigError(
            f"teachers.{name}.path: {len(differing)} tokens have another id than in the student's "
            f"tokenizer (0 allowed), e.g. {examples}"
        )
    return student


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve_path(path))
    return tokenizer


def check_equal_start(
    config: RunConfig,
    branch: BranchConfig,
    pools: Mapping[str, PromptPool],
    score: Callable[[str, Sequence[TokenSpan]], list[FloatArray]],
) -> None:
    """Where the student starts as the domain teacher, their scores must be equal to the bit.

    Any difference between the two forward passes would become a positive domain score and be
    selected on (requirement 1 of CaMOPD's implementation). Collective: every rank calls it.
    """
    if resolve_path(config.teachers[branch.teacher].path) != resolve_path(config.student.path):
        return
    prompts = pools[branch.pool].train[:NUM_PROBE_PROMPTS]
    spans = [
        TokenSpan(
            token_ids_N=np.asarray(prompt.token_ids, dtype=np.int32),
            num_scored=min(MAX_PROBE_TOKENS, len(prompt.token_ids) - 1),
        )
        for prompt in prompts
    ]
    student = np.concatenate(score("student", spans))
    teacher = np.concatenate(score(branch.teacher, spans))
    largest = float(np.abs(student - teacher).max())
    if largest != 0:  # true for NaN as well
        raise RuntimeError(
            f"the student starts as teacher {branch.teacher!r}, but their log-probabilities differ "
            f"by up to {largest:.3g} (0 allowed): the two do not run through the same code"
        )


def check_first_batch(metrics: Mapping[str, float], limits: ChecksConfig) -> None:
    """The rollout engine and the trainer must agree on what the student's policy is.

    Raises `RuntimeError` naming the number found and the number allowed.
    """
    allowed = {
        "log_ratio_absolute": ("max_mean_log_ratio", limits.max_mean_log_ratio),
        "masked_fraction": ("max_masked_fraction", limits.max_masked_fraction),
    }
    for name, value in metrics.items():
        branch, _, quantity = name.partition("/")
        if quantity not in allowed:
            continue
        key, limit = allowed[quantity]
        if not value <= limit:  # NaN fails too
            raise RuntimeError(
                f"first batch of branch {branch!r}: {quantity} is {value:.4f}, checks.{key} allows "
                f"{limit}: the rollout engine does not sample from the student that is trained "
                "(wrong weights, tokenizer, or precision)"
            )


def check_pools(pools: Mapping[str, PromptPool], config: RunConfig) -> None:
    """Every held-out measurement must find as many prompts as it asks for."""
    for name, heldout in config.evaluate.heldout.items():
        found = len(pools[heldout.pool].heldout)
        if found < heldout.prompts:
            raise ConfigError(
                f"evaluate.heldout.{name}.prompts: found {heldout.prompts}, but pool "
                f"{heldout.pool!r} holds out {found}; raise data.heldout_fraction or ask for fewer"
            )


def describe_run(run: RunDir, pools: Mapping[str, PromptPool]) -> list[str]:
    """Lines for the log: what is about to be trained on."""
    lines = [f"run directory {run.path}"]
    for pool in pools.values():
        lengths = [len(prompt.token_ids) for prompt in pool.train]
        lines.append(
            f"pool {pool.name}: {len(pool.train)} prompts to train on, {len(pool.heldout)} held "
            f"out, {pool.num_dropped} too long; {np.mean(lengths):.0f} tokens on average, "
            f"{max(lengths)} at most"
        )
    return lines
