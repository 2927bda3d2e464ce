"""Rules that every class of the configuration tree keeps."""

import dataclasses
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from megadistill.config import algorithm, campaign, cluster, schema, work
from megadistill.config.campaign import CampaignConfig
from megadistill.config.schema import RunConfig

MOST_FIELDS = 20


def classes_below(kind: Any, found: set[type]) -> set[type]:
    """All configuration classes that a type mentions, itself included."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if kind not in found:
            found.add(kind)
            for hint in get_type_hints(kind).values():
                classes_below(hint, found)
    elif get_origin(kind) in (Union, UnionType, Annotated, list, dict):
        for part in get_args(kind):
            classes_below(part, found)
    return found


def test_no_class_has_more_than_twenty_fields() -> None:
    sizes = {kind.__name__: len(dataclasses.fields(kind)) for kind in tree_classes()}
    assert {name: size for name, size in sizes.items() if size > MOST_FIELDS} == {}


def test_every_class_of_the_schema_is_part_of_the_tree() -> None:
    modules = (schema, algorithm, cluster, work, campaign)
    members = [member for module in modules for member in vars(module).values()]
    defined = {kind for kind in members if dataclasses.is_dataclass(kind)}
    used = tree_classes()
    assert defined == used | {base for kind in used for base in kind.__mro__[:-1]}


def test_every_class_is_frozen_and_refuses_unknown_keys() -> None:
    for kind in tree_classes():
        assert vars(kind)["__dataclass_params__"].frozen, kind
        assert vars(kind)["__pydantic_config__"]["extra"] == "forbid", kind


def tree_classes() -> set[type]:
    return classes_below(RunConfig, set()) | classes_below(CampaignConfig, set())
