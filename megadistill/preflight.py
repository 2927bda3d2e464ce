"""What can be checked before anything is allocated: no GPU, no torch, all problems at once."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from megadistill.config import ConfigError, RunConfig, resolve_path
from megadistill.convert.families import ModelSpec, read_spec
from megadistill.rundir import RunDir


def check_config(config: RunConfig) -> None:
    """Paths, model shapes against the layout, lengths and disk space.

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
    problems += [
        *_length_problems(specs, config),
        *_overlap_problems(config),
        *_vocabulary_problems(specs, config),
        *_disk_problems(config),
        *_export_problems(config),
    ]
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


def _overlap_problems(config: RunConfig) -> list[str]:
    """Engines that sleep while the trainer steps cannot sample meanwhile."""
    rollout = config.rollout
    if rollout and rollout.max_staleness and rollout.placement == "colocated":
        return ["rollout.max_staleness: found 1, expected 0 with rollout.placement colocated"]
    return []


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
