"""Rules that every class of the configuration tree keeps."""

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from megadistill.config import (
    KINDS,
    algorithm,
    campaign,
    cluster,
    evaluate,
    prepare,
    refine,
    schema,
    work,
)
from megadistill.config.fields import Config

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
    modules = (schema, algorithm, cluster, work, campaign, evaluate, prepare, refine)
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
