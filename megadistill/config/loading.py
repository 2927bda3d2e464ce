"""YAML files, includes and `key.path=value` overrides to one validated configuration of any kind."""

import copy
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import ValidationError

from megadistill.config.core_yaml import in_one_line, read_yaml, write_yaml
from megadistill.config.fields import Config

Kind = TypeVar("Kind", bound=Config)


class ConfigError(ValueError):
    """A configuration a user must change; the message lists every problem with its key."""

    @classmethod
    def listing(cls, source: str, problems: Sequence[str]) -> Self:
        """The report of them all, one a line."""
        lines = [f"  {problem}" for problem in problems]
        return cls("\n".join([f"{source}: {len(lines)} problem(s)", *lines]))


def load(kind: type[Kind], path: str | Path, overrides: Sequence[str] = ()) -> Kind:
    """Read `path`, merge what it includes, apply overrides, and validate.

    An override is `key.path=value`, or another YAML file that is merged over what is there.
    Raises `ConfigError` with all problems at once.
    """
    return parse(kind, read_tree(path, overrides), source=str(path))


def parse(
    kind: type[Kind],
    tree: Mapping[str, Any],
    source: str = "config",
    *,
    unknown: Literal["forbid", "ignore"] = "forbid",
) -> Kind:
    """Validate a plain mapping; wrong types and, unless they are ignored, unknown keys are errors."""
    try:
        return kind.model_validate(tree, extra=unknown)
    except ValidationError as error:
        problems = [line for problem in error.errors() for line in _describe(problem, tree)]
        raise ConfigError.listing(source, problems) from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML, itself a valid input."""
    tree = config.model_dump(mode="json")
    return write_yaml(tree)


def json_schema(kind: type[Config]) -> dict[str, Any]:
    """Describes the files of a kind to editors; what a file includes may have any of their keys."""
    schema: dict[str, Any] = _of_a_part(kind.model_json_schema())
    files = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    included = files | {"description": "Files, relative to this one, that this one changes."}
    return schema | {"properties": {"include": included} | schema["properties"]}


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of any configuration file with its includes and overrides, not validated."""
    tree = _read_tree(Path(path), seen=())
    for override in overrides:
        if "=" not in override and override.endswith((".yaml", ".yml")):
            tree = _merge(tree, _read_tree(Path(override), seen=()))
        else:
            _apply_override(tree, override)
    return tree


def first_day(file: Path, *keys: str) -> datetime.date | None:
    """Today, or where work goes on the day on which it began: what its configuration says at `keys`."""
    if not file.exists():
        return datetime.date.today()
    found: Any = read_tree(file)
    for key in keys:
        found = (found or {}).get(key)
    return None if found is None else datetime.date.fromisoformat(found)


def cache_dir() -> Path:
    """Where prepared models are kept: `$MEGADISTILL_CACHE`, or `~/.cache/megadistill`."""
    return Path(os.environ.get("MEGADISTILL_CACHE", "~/.cache/megadistill")).expanduser()


def resolve_path(path: str) -> str:
    """`cache:NAME` below the cache, `~` and `$VARIABLES` expanded; hub names stay as they are."""
    if path.startswith("cache:"):
        return str(cache_dir() / path.removeprefix("cache:"))
    return os.path.expandvars(str(Path(path).expanduser())) if path[:1] in "~/.$" else path


def _of_a_part(schema: Any) -> Any:
    """A schema (any JSON) that asks for no key, not even for the one that tells a union's members."""
    if isinstance(schema, dict):
        left_out = ("required", "discriminator")
        found = {key: _of_a_part(value) for key, value in schema.items() if key not in left_out}
        return {"anyOf" if key == "oneOf" else key: value for key, value in found.items()}
    return [_of_a_part(value) for value in schema] if isinstance(schema, list) else schema


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: includes itself")
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {in_one_line(error)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else json.dumps(tree, default=str)[:60]
        raise ConfigError(f"{path}: found {found}, expected a mapping of settings")
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
        node[leaf] = read_yaml(text)
    except yaml.YAMLError as error:
        why = in_one_line(error)
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {why}") from None


def _describe(problem: Any, tree: Any) -> list[str]:
    """One line a problem: the dotted key, the value found, and what was expected."""
    keys = _keys(problem, tree)
    key, kind, found = ".".join(map(str, keys)), problem["type"], problem["input"]
    message: str = problem["msg"]
    if kind == "value_error":  # contradictions of a section, which name its keys themselves
        return [
            ".".join([*map(str, keys), line]) for line in str(problem["ctx"]["error"]).split("\n")
        ]
    if kind == "extra_forbidden":
        message = "expected nothing, there is no such setting"
    if kind == "model_type":
        message = "expected a mapping of settings"
    if kind == "union_tag_not_found":
        message = "kind is missing, which says what this is"
    if isinstance(found, dict | list) or kind == "missing":
        return [f"{key}: {message}"]
    return [f"{key}: found {json.dumps(found, default=str)}: {message}"]


def _keys(problem: Any, tree: Any) -> list[str | int]:
    """Where a problem of a tree is, as a user writes it.

    Pydantic's location also says which member of a union it is about; a part that the tree has no
    such key for is that, or at the very end a key that is missing.
    """
    keys: list[str | int] = []
    for part in problem["loc"]:
        if (isinstance(tree, dict) and part in tree) or (
            isinstance(tree, list) and isinstance(part, int)
        ):
            keys.append(part)
            tree = tree[part]
    return [*keys, problem["loc"][-1]] if problem["type"] == "missing" else keys
