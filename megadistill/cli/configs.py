"""Verbs of configuration files: show, check and describe them, and those that ship to begin from."""

import json
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from megadistill import recipes as shipped
from megadistill.cli.verbs import Overrides, Source, family, verb
from megadistill.config import KINDS, KindName, dump, json_schema, kind_of, load

config = family(
    "config",
    "Show, check, or describe configurations.",
    example="config show configs/camopd/medical.yaml",
)
recipes = family("recipes", "List and copy what ships with the package.", example="recipes list")


@verb(config, example="config show configs/camopd/medical.yaml batch.size=64")
def show(file: Source, overrides: Overrides = None) -> None:
    """The resolved configuration: includes, defaults and overrides."""
    print(dump(load(KINDS[kind_of(file)], file, overrides or ())), end="")


@verb(config, example="config check configs/*/[!_]*.yaml")
def check(
    files: Annotated[list[str], Argument(metavar="CONFIG", help="files or run directories")],
    models: Annotated[bool, Option("--models", help="Also models, data and disk.")] = False,
) -> int:
    """Every problem of every file; with --models also what models, data and disk say."""
    from megadistill.cli.check import problem_of

    problems = [text for file in files if (text := problem_of(file, with_models=models))]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(files) - len(problems)} of {len(files)} files are valid")
    return 1 if problems else 0


@verb(config, example="config schema --kind campaign")
def schema(
    kind: Annotated[KindName, Option(help="Of which kind of file.")] = "run",
    write: Annotated[str | None, Option(metavar="DIR", help="Of all kinds, into files.")] = None,
) -> None:
    """The JSON schema, for editors: what configs/schemas holds."""
    texts = {name: json.dumps(json_schema(KINDS[name]), indent=2) + "\n" for name in KINDS}
    if write is None:
        print(texts[kind], end="")
    else:
        for name, text in texts.items():
            (Path(write) / f"{name}.json").write_text(text, encoding="utf-8")


@verb(recipes, "list", example="recipes list")
def list_recipes() -> None:
    """The configurations and job scripts that ship with the package."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, overflow="ignore")  # names are for copying
    for name, sentence in shipped.recipes().items():
        table.add_row(name, sentence)
    Console().print(table)


@verb(recipes, "copy", example="recipes copy camopd/medical .")
def copy_recipe(
    name: Annotated[str, Argument(help="as `recipes list` shows it, or a folder")],
    directory: Annotated[str, Argument(metavar="DIR", help="where configs/ and slurm/ go")],
) -> None:
    """Copy one, or a folder of them, with all that it includes or names, to begin from."""
    for path in shipped.copy(name, Path(directory)):
        print(path)
