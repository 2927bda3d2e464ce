"""Rules that every class of the configuration tree keeps."""

import json
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import jsonschema
import pytest

from megadistill.config import (
    KINDS,
    KindName,
    algorithm,
    campaign,
    cluster,
    distillation,
    evaluate,
    json_schema,
    kind_of,
    prepare,
    refine,
    schema,
    work,
)
from megadistill.config.core_yaml import read_yaml
from megadistill.config.fields import Config

CONFIGS = Path(__file__).parents[2] / "configs"
MOST_FIELDS = 20


def classes_below(kind: Any, found: set[type[Config]]) -> set[type[Config]]:
    """All configuration classes that a type mentions, itself included."""
    if isinstance(kind, type) and issubclass(kind, Config):
        if kind not in found:
            found.add(kind)
            for field in kind.model_fields.values():
                classes_below(field.annotation, found)
    elif get_origin(kind) in (Union, UnionType, Annotated, list, dict):
        for part in get_args(kind):
            classes_below(part, found)
    return found


def test_no_class_has_more_than_twenty_fields() -> None:
    sizes = {kind.__name__: len(kind.model_fields) for kind in tree_classes()}
    assert {name: size for name, size in sizes.items() if size > MOST_FIELDS} == {}


def test_every_class_of_the_schema_is_part_of_the_tree() -> None:
    modules = (schema, algorithm, distillation, cluster, work, campaign, evaluate, prepare, refine)
    members = [member for module in modules for member in vars(module).values()]
    defined = {kind for kind in members if isinstance(kind, type) and issubclass(kind, Config)}
    used = tree_classes()
    assert defined == used | {
        base for kind in used for base in kind.__mro__ if issubclass(base, Config)
    }


def test_every_class_is_frozen_and_refuses_unknown_keys() -> None:
    for kind in tree_classes():
        assert kind.model_config["frozen"], kind
        assert kind.model_config["extra"] == "forbid", kind


def tree_classes() -> set[type[Config]]:
    found: set[type[Config]] = set()
    for kind in KINDS.values():
        classes_below(kind, found)
    return found


def errors(file: Path, text: str) -> list[str]:
    """What an editor would say about a file with this text: the kinds of the errors."""
    (name,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)\n", text)
    schema = json.loads((file.parent / name).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    found = jsonschema.Draft202012Validator(schema).iter_errors(read_yaml(text))
    return [f"{'.'.join(map(str, error.path))} {error.validator}" for error in found]


@pytest.mark.parametrize("kind", KINDS)
def test_the_committed_schemas_are_up_to_date(kind: KindName) -> None:
    committed = json.loads((CONFIGS / f"schemas/{kind}.json").read_text())
    assert committed == json_schema(KINDS[kind]), (
        "run: megadistill config schema --write configs/schemas"
    )


@pytest.mark.parametrize(
    "file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_every_shipped_file_names_its_schema_and_keeps_to_it(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.startswith(f"# yaml-language-server: $schema=../schemas/{kind_of(file)}.json\n")
    assert errors(file, text) == []


def test_an_editor_is_told_of_wrong_keys_and_values() -> None:
    file = CONFIGS / "camopd/mine.yaml"
    head = "# yaml-language-server: $schema=../schemas/run.json\ninclude: medical.yaml\n"
    assert errors(file, head + "algorithm: {kind: camopd, general: {scale: 3}}\n") == []
    assert errors(file, head + "algorithm: {kind: camopd, general: {scail: 3}}\n") == [
        "algorithm anyOf"
    ]
    assert errors(file, head + "steps: soon\nsede: 1\n") == [
        " additionalProperties",
        "steps type",
    ]
