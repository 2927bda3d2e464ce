"""mkdocs hook: the configuration reference, one page a kind of file, made from the schema.

`mkdocs build` calls it; nothing that it makes is kept in the repository.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from megadistill.config import KINDS, json_schema

Schema = Mapping[str, Any]  # JSON
TITLES = {
    "run": "Training runs",
    "eval": "Evaluations",
    "refine": "Refinements",
    "prepare": "Preparations",
    "campaign": "Campaigns",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    for kind, title in TITLES.items():
        text = "\n".join(page(title, json_schema(KINDS[kind])))
        files.append(File.generated(config, f"reference/{kind}.md", content=text))
    return files


def page(title: str, schema: Schema) -> Iterator[str]:
    """The Markdown of one kind: the file itself, then each section that it can have."""
    yield f"# {title}\n\n{schema.get('description', '')}\n"
    yield from fields(schema)
    for name, definition in sorted(schema.get("$defs", {}).items()):
        if "properties" in definition:
            yield f"\n## {name}\n\n{definition.get('description', '')}\n"
            yield from fields(definition)


def fields(schema: Schema) -> Iterator[str]:
    """The table of an object's keys."""
    yield "| key | type | default | meaning |\n| --- | --- | --- | --- |"
    required = schema.get("required", [])
    for key, value in schema.get("properties", {}).items():
        default = "required" if key in required else code(value.get("default", "..."))
        meaning = value.get("description", "").replace("\n", " ").replace("|", "\\|")
        yield f"| `{key}` | {kind_of(value)} | {default} | {meaning} |"


def kind_of(value: Schema) -> str:
    """The type of a key, linked to its section where it is one."""
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for many in ("anyOf", "oneOf", "allOf"):
        if many in value:
            return " or ".join(kind_of(one) for one in value[many])
    if "const" in value:
        return code(value["const"])
    if "enum" in value:
        return ", ".join(code(one) for one in value["enum"])
    if value.get("type") == "array":
        return f"list of {kind_of(value['items'])}" if "items" in value else "list"
    if isinstance(inner := value.get("additionalProperties"), dict):
        return f"mapping to {kind_of(inner)}"
    return str(value.get("type", "any")) + bounds(value)


def bounds(value: Schema) -> str:
    """The limits of a number."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return "".join(f" {sign} {value[key]}" for key, sign in signs.items() if key in value)


def code(value: Any) -> str:  # any JSON value
    """A value as YAML shows it, short."""
    text = json.dumps(value, ensure_ascii=False)
    return f"`{text}`" if len(text) <= 60 else "..."
