"""YAML as configurations are written in: the core schema of YAML 1.2, each key once, bounded aliases.

PyYAML reads YAML 1.1, where `off` is false, `1:30:00` is 5400 and `1e-6` is text.
"""

import re
from typing import Any

import yaml

MOST_VALUES = 100_000
"""In one file, with all that its aliases repeat."""

_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
    "merge": "<<",
}


class CoreLoader(yaml.SafeLoader):
    """Reads the core schema. Raises `yaml.YAMLError` for a key that stands twice and for aliases
    that hold themselves or repeat too much."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML has it so

    def construct_document(self, node: yaml.Node) -> Any:  # whatever the file holds
        """The file's values, once its nodes are found in order."""
        _check(node, open_nodes=set(), sizes={})
        return super().construct_document(node)


class CoreDumper(yaml.SafeDumper):
    """Quotes every text that the core schema or YAML 1.1 would read as something else."""

    yaml_implicit_resolvers: dict[Any, Any] = {  # noqa: RUF012 - PyYAML has it so
        first: list(found) for first, found in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _class in (CoreLoader, CoreDumper):
    for _name, _pattern in _SCALARS.items():
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"^({_pattern})$"), None
        )


def read_yaml(text: str) -> Any:
    """The values of a YAML document. Raises `yaml.YAMLError`."""
    try:
        return yaml.load(text, CoreLoader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def in_one_line(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the text around it."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    said = [(error.context, error.context_mark), (error.problem, error.problem_mark)]
    places = [f" (line {m.line + 1}, column {m.column + 1})" if m else "" for _, m in said]
    return ": ".join(
        text + place for (text, _), place in zip(said, places, strict=True) if text is not None
    )


def write_yaml(tree: Any) -> str:
    """Plain values as YAML, in their order."""
    text: str = yaml.dump(tree, Dumper=CoreDumper, sort_keys=False, allow_unicode=True)
    return text


def _check(node: yaml.Node, open_nodes: set[int], sizes: dict[int, int]) -> int:
    """The number of values in a node."""
    if id(node) in open_nodes:
        raise yaml.MarkedYAMLError(
            problem="an alias inside of itself", problem_mark=node.start_mark
        )
    if id(node) in sizes or isinstance(node, yaml.ScalarNode):
        return sizes.get(id(node), 1)
    open_nodes.add(id(node))
    children = node.value
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        children = [value for _, value in node.value]
    size = 1 + sum(_check(child, open_nodes, sizes) for child in children)
    open_nodes.remove(id(node))
    if size > MOST_VALUES:
        raise yaml.MarkedYAMLError(
            problem=f"more than {MOST_VALUES} values, aliases counted each time",
            problem_mark=node.start_mark,
        )
    sizes[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode) -> None:
    seen: dict[str, yaml.Mark] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise yaml.MarkedYAMLError(
                context=f"the key {key.value!r} first stands here",
                context_mark=seen[key.value],
                problem="and again",
                problem_mark=key.start_mark,
            )
        seen[str(key.value)] = key.start_mark
