"""YAML files, includes and `key.path=value` overrides to one validated `RunConfig`."""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from megadistill.config.schema import RunConfig

Config = TypeVar("Config")
_ADAPTER: TypeAdapter[RunConfig] = TypeAdapter(RunConfig)
_STAND_INS = {"name": "unnamed", "steps": 1}
_KINDS = (
    *("sft", "mopd", "camopd", "raft", "packaged", "reasoning_gym", "file", "dataset"),
    *("endpoint", "serve", "mixture", "conversations"),
)
_NO_SECTION = ("dataclass_type", "dict_type", "list_type")
Keys = tuple[str | int, ...]
"""Where a setting lies in the tree."""


class ConfigError(ValueError):
    """A configuration a user must change; the message lists every problem with its key."""

    @classmethod
    def listing(cls, source: str, problems: Sequence[str]) -> Self:
        """The report of them all, one a line."""
        lines = [f"  {problem}" for problem in problems]
        return cls("\n".join([f"{source}: {len(lines)} problem(s)", *lines]))


@dataclass(frozen=True, slots=True)
class Reading:
    """What a mapping of settings says, as far as it can be understood."""

    problems: list[str]
    config: RunConfig | None
    """It without the settings at fault; None where one is missing that has no default."""
    at_fault: tuple[str, ...] = ()
    """Dotted keys of the wrong values that were left out; unknown keys are not among them."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, merge what it includes, apply overrides, and validate.

    An override is `key.path=value`, or another YAML file that is merged over what is there.
    Raises `ConfigError` with all problems at once.
    """
    return parse_config(read_tree(path, overrides), source=str(path))


def parse_config(tree: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Validate a plain mapping; unknown keys and wrong types are errors."""
    reading = read_settings(tree)
    if reading.problems or reading.config is None:
        raise ConfigError.listing(source, reading.problems)
    return reading.config


def read_settings(tree: Mapping[str, Any]) -> Reading:
    """Every problem of the settings, and what is left without those that have one.

    So that what can only be asked of a whole configuration, e.g. whether its models are there, does
    not have to wait until every key is right.
    """
    rest = _unshared(dict(tree))
    problems: list[str] = []
    at_fault: dict[Keys, None] = {}
    while True:
        try:
            config = _ADAPTER.validate_python(rest)
        except ValidationError as error:
            found = [(_keys(problem["loc"]), problem) for problem in error.errors()]
            for keys, problem in found:
                # What a section lacks, or says against itself, without the setting we took is no news.
                if not any(known[: len(keys)] == keys for known in at_fault):
                    problems += _describe(problem)
            for keys, problem in found:
                if problem["type"] != "unexpected_keyword_argument":
                    at_fault[keys] = None
            sections = any(problem["type"] in _NO_SECTION for _, problem in found)
            if sections or not all(_leave_out(rest, keys) for keys, _ in found):
                return Reading(problems, None)
        else:
            dotted = tuple(".".join(map(str, keys)) for keys in at_fault)
            return Reading([*problems, *config.contradictions()], config, dotted)


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of any configuration file with its includes and overrides, not validated."""
    tree = _read_tree(Path(path), seen=())
    for override in overrides:
        if "=" not in override and override.endswith((".yaml", ".yml")):
            tree = _merge(tree, _read_tree(Path(override), seen=()))
        else:
            _apply_override(tree, override)
    return tree


def validate(adapter: TypeAdapter[Config], tree: Mapping[str, Any], source: str) -> Config:
    """`tree` as what the adapter describes; `ConfigError` with every problem and its dotted key."""
    try:
        return adapter.validate_python(tree)
    except ValidationError as error:
        problems = [line for problem in error.errors() for line in _describe(problem)]
        raise ConfigError.listing(source, problems) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, itself a valid input."""
    tree = _ADAPTER.dump_python(config, mode="json")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def config_schema() -> dict[str, Any]:
    """JSON schema of a run's configuration."""
    return _ADAPTER.json_schema()


def cache_dir() -> Path:
    """Where prepared models are kept: `$MEGADISTILL_CACHE`, or `~/.cache/megadistill`."""
    return Path(os.environ.get("MEGADISTILL_CACHE", "~/.cache/megadistill")).expanduser()


def resolve_path(path: str) -> str:
    """`cache:NAME` below the cache, `~` and `$VARIABLES` expanded; hub names stay as they are."""
    if path.startswith("cache:"):
        return str(cache_dir() / path.removeprefix("cache:"))
    return os.path.expandvars(str(Path(path).expanduser())) if path[:1] in "~/.$" else path


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: includes itself")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found {type(tree).__name__}, expected a mapping of settings")
    tree = _unshared(tree)
    includes = tree.pop("include", [])
    names = [includes] if isinstance(includes, str) else includes
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: include: found {includes!r}, expected a file or a list of them")
    merged: dict[str, Any] = {}
    for name in names:
        merged = _merge(merged, _read_tree(path.parent / name, (*seen, path.resolve())))
    return _merge(merged, tree)


def _unshared(tree: Any) -> Any:
    """A copy in which what YAML's aliases share is there twice, so that one can change alone."""
    if isinstance(tree, dict):
        return {key: _unshared(value) for key, value in tree.items()}
    return [_unshared(value) for value in tree] if isinstance(tree, list) else tree


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; a mapping whose `kind` differs, and everything else, replaces."""
    result = copy.deepcopy(base)
    for key, value in top.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and _same_kind(old, value):
            result[key] = _merge(old, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _same_kind(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return "kind" not in new or new["kind"] == old.get("kind")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: expected key.path=value, or a .yaml file")
    node = tree
    *parents, leaf = key.split(".")
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {name!r} is not a section")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None


def _describe(problem: Any) -> list[str]:
    """One line a problem: the dotted key, the value found, and what was expected."""
    message: str = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:  # a check of the whole tree, which names its keys itself
        return message.split("; ")
    key, found = ".".join(map(str, _keys(problem["loc"]))), problem.get("input")
    if problem["type"] == "unexpected_keyword_argument":
        message = "expected nothing, there is no such setting"
    if problem["type"] == "union_tag_not_found":
        message = f"{problem['ctx']['discriminator']} is missing, which says what this is"
    if isinstance(found, dict | list) or problem["type"] == "missing":
        return [f"{key}: {message}"]
    return [f"{key}: found {json.dumps(found, default=str)}: {message}"]


def _leave_out(tree: Any, keys: Keys) -> bool:
    """Whether the settings (mappings, lists) can do without this one; it is removed from them.

    A run's name and length, which any value would do for here, are replaced.
    """
    *parents, leaf = keys
    if not parents and leaf in _STAND_INS:
        tree[leaf] = _STAND_INS[str(leaf)]
        return True
    for name in parents:
        tree = tree[int(name)] if isinstance(tree, list) else tree.get(name)
        if not isinstance(tree, dict | list):
            return False
    if not isinstance(tree, dict) or leaf not in tree:
        return False
    del tree[leaf]
    return True


def _keys(location: Sequence[str | int]) -> Keys:
    """As a user writes them: without the `kind` that pydantic puts behind a tagged union."""

    def is_kind(index: int) -> bool:
        before, two_before = (None, None, *location)[index + 1], (None, None, *location)[index]
        tagged = before in ("algorithm", "recipe") or isinstance(before, int)
        return location[index] in _KINDS and (tagged or two_before in ("systems", "models"))

    return tuple(part for index, part in enumerate(location) if not is_kind(index))
