"""Checks before anything is allocated: no GPU, no torch, all problems at once."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from megadistill.config import RunConfig, resolve_path
from megadistill.config.schema import FileSource
from megadistill.convert.families import ModelSpec, read_spec
from megadistill.convert.weight_files import check_weights
from megadistill.data.files import files_of
from megadistill.data.tokenizer_files import (
    check_chat_template,
    check_same,
    read_vocabulary,
    unused_tokens,
)
from megadistill.resolve import resolve
from megadistill.rollout.model_files import eos_token_ids
from megadistill.rundir import RunDir

CHECKPOINT_BYTES = 14
"""Of a parameter in a checkpoint: fp32 master weight and two moments, and the bf16 weight."""

WEIGHT_COPIES = 4
"""Of the weights on disk beside checkpoints: two published, the next one, and the export."""


ADVICE = (
    "; `megadistill prepare` makes the papers' sets (configs/prepare/), `megadistill refine` refined "
    "answers (configs/refine/)"
)


def machine_problems(config: RunConfig) -> list[str]:
    """Paths, model shapes against the layout, lengths and disk space: each problem with its key."""
    problems: list[str] = []
    specs: dict[str, ModelSpec] = {}
    expected: dict[str, int] = {}
    unused: set[str] = set()
    for key, path in model_paths(config).items():
        try:
            directory = resolve("model", path, key=f"{key}.path", download=False)
        except ValueError as error:
            problems.append(str(error))
            continue
        try:
            specs[key] = read_spec(directory)
            vocabulary = check_model(directory, is_asked=key == "student")
            if not expected:  # the student's, which comes first
                expected, unused = vocabulary, unused_tokens(directory)
            check_same(vocabulary or expected, expected, unused)
        except ValueError as error:
            problems.append(f"{key}.path: {error}")
    for key, spec in specs.items():
        problems += _parallel_problems(key, spec, config)
    return [
        *problems,
        *_data_problems(config),
        *_length_problems(specs, config),
        *_support_problems(specs, config),
        *_overlap_problems(config),
        *_heldout_problems(specs, config),
        *_disk_problems(specs, config),
        *_export_problems(config),
    ]


def check_model(directory: Path, *, is_asked: bool = True) -> dict[str, int]:
    """Open what a run, an engine or a server would: weights, tokenizer and, if chats are put to the
    model, the chat template and what ends an answer. Returns the vocabulary, as far as it can be
    read; raises `ValueError`.
    """
    check_weights(directory)
    vocabulary = read_vocabulary(directory)
    if is_asked:
        check_chat_template(directory)
        eos_token_ids(directory)
    return vocabulary


def model_paths(config: RunConfig) -> dict[str, str]:
    """Dotted key -> path of every model the run loads."""
    teachers = {f"teachers.{name}": model.path for name, model in config.teachers.items()}
    return {"student": config.student.path, **teachers}


def used_pools(config: RunConfig) -> list[str]:
    """Pools that the algorithm or a held-out measurement reads."""
    used = set(config.algorithm.pools.values())
    used |= {chosen.pool for chosen in config.evaluate.heldout.values()}
    return sorted(used | {chosen.pool for chosen in config.evaluate.answers.values()})


def _data_problems(config: RunConfig) -> list[str]:
    """Files of prompts and data sets that are not on this machine, or that nobody can read."""
    sources = {
        f"data.pools.{name}.sources[{index}].path": source
        for name in set(used_pools(config)) & config.data.pools.keys()
        for index, source in enumerate(config.data.pools[name].sources)
    }
    problems: list[str] = []
    for key, source in sources.items():
        try:
            files_of(source.location, key=key, download=False)
        except ValueError as error:
            advice = ADVICE if isinstance(source, FileSource) else ""
            problems.append(f"{error}{advice}")
    return problems


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


def _support_problems(specs: Mapping[str, ModelSpec], config: RunConfig) -> list[str]:
    """A model has no more probable ids than ids."""
    algorithm = config.algorithm
    sizes = {
        f"algorithm.{part}.size": getattr(getattr(algorithm, part, None), "size", 0)
        for part in ("loss", "tokens")
    } | {"algorithm.top_k": getattr(algorithm, "top_k", 0)}
    most = min((spec.vocab_size for spec in specs.values()), default=max(sizes.values()))
    return [
        f"{key}: found {size}, expected at most {most}, the ids that all models have"
        for key, size in sizes.items()
        if size > most
    ]


def _overlap_problems(config: RunConfig) -> list[str]:
    """Engines that sleep while the trainer steps cannot sample meanwhile."""
    rollout = config.rollout
    if rollout and rollout.max_staleness and rollout.placement == "colocated":
        return ["rollout.max_staleness: found 1, expected 0 with rollout.placement colocated"]
    return []


def _heldout_problems(specs: Mapping[str, ModelSpec], config: RunConfig) -> list[str]:
    """The student's engines sample with these teachers' weights, so they must be of one shape."""
    problems: list[str] = []
    for name, heldout in config.evaluate.heldout.items():
        teacher = specs.get(f"teachers.{heldout.teacher}")
        student = specs.get("student", teacher)
        if teacher is None or student is None:
            continue
        found = asdict(replace(teacher, max_positions=0))
        expected = asdict(replace(student, max_positions=0))
        if differing := [key for key, value in found.items() if value != expected[key]]:
            what = ", ".join(f"{key} {found[key]} ({expected[key]})" for key in differing)
            problems.append(
                f"evaluate.heldout.{name}.teacher: teachers.{heldout.teacher} has {what}, expected "
                "the student's, in parentheses, whose engines sample its texts"
            )
    return problems


def _export_problems(config: RunConfig) -> list[str]:
    """A run that begins must not find its export made by another."""
    named = config.checkpoint.export_dir
    if named is None or not Path(resolve_path(named)).exists():
        return []
    if RunDir.of(config).whole_checkpoints():
        return []
    return [
        f"checkpoint.export_dir: found {resolve_path(named)!r}, which another run has written; "
        "delete it or name another"
    ]


def _disk_problems(specs: Mapping[str, ModelSpec], config: RunConfig) -> list[str]:
    """Room for checkpoints, one more while the oldest is still there, and copies of the weights."""
    if "student" not in specs:
        return []
    run = RunDir.of(config)
    weight = 4 if config.precision == "fp32" else 2
    checkpoints = CHECKPOINT_BYTES * (config.checkpoint.keep + 1)
    needed = specs["student"].num_parameters * (checkpoints + weight * WEIGHT_COPIES)
    used = sum(
        file.stat().st_size
        for folder in ("checkpoints", "weights")
        for file in (run.path / folder).rglob("*")
        if file.is_file()
    )
    folder = run.path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free + used >= needed:
        return []
    return [
        f"runs_dir: {free / 2**30:.1f} GiB are free at {folder}, expected {(needed - used) / 2**30:.1f}"
        f" for checkpoint.keep = {config.checkpoint.keep} and one more of "
        f"{CHECKPOINT_BYTES} bytes a parameter, and {WEIGHT_COPIES} copies of the weights"
    ]
