"""Start-up checks that fail closed: each says the number found and the number allowed."""

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from megadistill.atomic import write_atomic
from megadistill.config import ConfigError, RunConfig
from megadistill.config.distillation import BranchConfig
from megadistill.config.schema import AnswersConfig, ChecksConfig, HeldoutConfig
from megadistill.convert.families import read_spec
from megadistill.data.manifest import FILE
from megadistill.data.pools import PromptPool
from megadistill.data.tokenizer import answer_end, load_tokenizer
from megadistill.data.tokenizer_files import check_same, unused_tokens
from megadistill.resolve import resolve
from megadistill.rundir import RunDir, changed_values, read_object
from megadistill.types import FloatArray, ScoreRequest, TokenScores, TokenSpan

log = logging.getLogger(__name__)

NUM_PROBE_PROMPTS = 2
"""Prompts of a branch, scored by the student and an equal teacher before the first step."""

MAX_PROBE_TOKENS = 32
"""Scored tail of a probe prompt."""

MASS_TOLERANCE = 1e-3
"""How far from 1 the probabilities of all ids may add up in fp32."""


def common_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The student's tokenizer, after checking that the teachers read its ids the same way.

    Raises `ConfigError` on a missing chat template or end token, and on a token of prompts or responses
    that has another id or none in a teacher: probabilities are compared id by id.
    """
    student = load_tokenizer(config.student.path)
    if not student.chat_template:
        raise ConfigError(f"student.path: {config.student.path} has no chat template")
    if (end := answer_end(student)[-1]) != student.eos_token_id:
        log.warning(
            "student.path: the chat template ends a turn with %r, the tokenizer's end token is %r: "
            "answers are trained to end as the template says, but sampling stops where config.json "
            "or generation_config.json say",
            *(student.decode([token]) for token in (end, student.eos_token_id)),
        )
    unused = unused_tokens(resolve("model", config.student.path))
    for name, model in config.teachers.items():
        if model.path != config.student.path:
            _check_ids(name, load_tokenizer(model.path), student, unused)
    return student


def _check_ids(
    name: str,
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    unused: Collection[str],
) -> None:
    """Every token that a prompt or a response can hold has one id in both; what else differs is told."""
    others, own = teacher.get_vocab(), student.get_vocab()
    try:
        check_same(others, own, unused)
    except ValueError as error:
        raise ConfigError(f"teachers.{name}.path: {error}") from None
    if (found := teacher.eos_token_id) != (expected := student.eos_token_id):
        raise ConfigError(
            f"teachers.{name}.path: its tokenizer's eos_token_id is {found}, expected {expected} "
            "as in the student's"
        )
    for whose, tokens in (("student", own.keys() - others), ("teacher", others.keys() - own)):
        if tokens:
            log.info(
                "teachers.%s: only the %s knows %s", name, whose, ", ".join(sorted(tokens)[:5])
            )
    for kind in ("bos_token", "pad_token"):
        if (found := getattr(teacher, kind)) != (expected := getattr(student, kind)):
            log.info("teachers.%s: its %s is %r, the student's %r", name, kind, found, expected)


def check_vocabularies(
    config: RunConfig,
    pools: Mapping[str, PromptPool],
    read: Callable[[str, Sequence[TokenSpan], ScoreRequest], list[TokenScores]],
) -> None:
    """The ids that all models have, and no row that pads a vocabulary, hold all of the probability.

    Collective: every rank calls it.
    """
    prompt = next(iter(pools.values())).train[0]
    span = TokenSpan(token_ids_N=np.asarray(prompt.token_ids, dtype=np.int32), num_scored=1)
    models = {"student": config.student, **config.teachers}
    size = min(read_spec(resolve("model", model.path)).vocab_size for model in models.values())
    for name in models:
        (found,) = read(name, [span], ScoreRequest(top_k=size))
        top = found.top_k
        assert top is not None
        mass = float(np.exp(top.logprobs_RK.astype(np.float64)).sum())
        num_ids = len(np.unique(top.ids_RK[(top.ids_RK >= 0) & (top.ids_RK < size)]))
        if num_ids != size or not abs(mass - 1) <= MASS_TOLERANCE:  # NaN fails too
            raise RuntimeError(
                f"{name}: {num_ids} of its {size} ids hold a probability of {mass:.6f} together, "
                f"expected all of them and 1 (within {MASS_TOLERANCE}): padding takes part"
            )


def check_equal_start(
    config: RunConfig,
    branch: BranchConfig,
    pools: Mapping[str, PromptPool],
    score: Callable[[str, Sequence[TokenSpan]], list[FloatArray]],
) -> None:
    """Where the student starts as the branch's teacher, their scores must be equal to the bit.

    Any difference between the two forward passes would become a positive domain score and be
    selected on (requirement 1 of CaMOPD's implementation). Collective: every rank calls it.
    """
    teacher_model = config.teachers[branch.teacher]
    starts = [resolve("model", model.path).resolve() for model in (config.student, teacher_model)]
    if starts[0] != starts[1]:
        return
    precisions = [model.precision or config.precision for model in (config.student, teacher_model)]
    if precisions[0] != precisions[1]:
        log.info("equal start: not checked, student in %s and teacher in %s differ", *precisions)
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
    evaluate = config.evaluate
    keys: dict[str, HeldoutConfig | AnswersConfig] = {
        **{f"heldout.{name}": chosen for name, chosen in evaluate.heldout.items()},
        **{f"answers.{name}": chosen for name, chosen in evaluate.answers.items()},
    }
    for key, heldout in keys.items():
        found = len(pools[heldout.pool].heldout)
        if found < heldout.prompts:
            raise ConfigError(
                f"evaluate.{key}.prompts: found {heldout.prompts}, but pool "
                f"{heldout.pool!r} holds out {found}; raise data.heldout_fraction or ask for fewer"
            )


def check_data(run: RunDir, config: RunConfig, marks: Mapping[str, str], *, writes: bool) -> None:
    """The prompts must be those with which the run began, or others be accepted.

    `marks` are a manifest, which the rank that `writes` keeps. Raises `ConfigError` with what changed.
    """
    file = run.path / "state" / "data.json"
    known: dict[str, str] = read_object(file)
    changed = changed_values(known, marks) if known else {}
    if all(FILE in key for key in changed):  # or nothing: the prompts are the same
        changed = {}
    if changed and not config.data.accept_changes:
        lines = [f"{key}: {change}" for key, change in changed.items()]
        problem = "found other prompts than those with which the run began:"
        advice = "restore them, or go on with the new ones by data.accept_changes=true"
        raise ConfigError("\n  ".join([problem, *lines, advice]))
    if writes and (changed or not known):
        write_atomic(file, json.dumps(marks, indent=1))
    if writes and changed:
        log.warning("data.accept_changes: the run goes on with other prompts: %s", changed)
        run.note_event("data changed", changed)


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
