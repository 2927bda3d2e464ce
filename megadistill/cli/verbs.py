"""Shared by all verbs: exit codes, common arguments, reading a command line without running it."""

import errno
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer import Argument, Option
from typer.core import TyperCommand, TyperGroup

import megadistill

if TYPE_CHECKING:
    from megadistill.rundir import RunDir

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)

Function = TypeVar("Function", bound=Callable[..., int | None])

Source = Annotated[str, Argument(metavar="CONFIG", help="YAML file, see configs/")]
RunOrSource = Annotated[str, Argument(metavar="CONFIG", help="YAML file, or a run directory")]
Overrides = Annotated[
    list[str] | None,
    Argument(metavar="KEY=VALUE", help="changes, e.g. batch.size=64, or files to merge"),
]
Run = Annotated[str, Argument(metavar="RUN", help="run directory, e.g. runs/camopd_medical")]
Wait = Annotated[bool, Option("--wait", help="Stay until the jobs of its `cluster` have ended.")]

_ONLY_READ = "only read"
WRITABLE = (
    "; expected a place that can be written, see `runs_dir` and the paths of the configuration"
)
DO_INSTEAD = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), WRITABLE),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "; expected a directory"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "; make room there, or choose another place"),
}


class Verb(TyperCommand):
    """A command that returns its exit code, if it has one besides 0."""

    def invoke(self, ctx: Any) -> None:  # any: typer has no public name for it
        if ctx.obj == _ONLY_READ:
            return
        try:
            code = super().invoke(ctx)
        except ValueError as error:
            print(f"megadistill: {error}", file=sys.stderr)
            code = 2
        except OSError as error:
            if error.errno == errno.EPIPE:  # who read our output has left
                raise
            print(f"megadistill: {in_one_line(error)}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            print("megadistill: interrupted; the same command goes on from here", file=sys.stderr)
            code = 128 + signal.SIGINT
        raise typer.Exit(code or 0)


def in_one_line(error: OSError) -> str:
    """What the system has refused, and of which file; what to do where that is known."""
    said = error.strerror or str(error)
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{said}{DO_INSTEAD.get(error.errno or 0, '')}"


class ImpliedVerb(TyperGroup):
    """Verbs of which the first may be left out; another may also be named by an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # any: as above
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            first, *others = self.commands
            named = next((name for name in others if f"--{name}" in args), first)
            args = [named, *(word for word in args if word != f"--{named}")]
        return super().parse_args(ctx, args)


def verb(
    group: typer.Typer, name: str | None = None, *, example: str
) -> Callable[[Function], Function]:
    """Makes a function a verb of a group."""
    return group.command(name, cls=Verb, epilog=f"\b\nExample: megadistill {example}")


def family(name: str, text: str, *, example: str, implied: bool = False) -> typer.Typer:
    """A group of verbs; `implied`: where none is said, the first is meant."""
    kind = ImpliedVerb if implied else TyperGroup
    example = f"\b\nExample: megadistill {example}"
    made = typer.Typer(cls=kind, epilog=example, no_args_is_help=True)
    app.add_typer(made, name=name, help=text)
    return made


def check_words(key: str, words: Sequence[str]) -> None:
    """Raise `ValueError` for a command line that could not even be read."""
    try:
        app(list(words), prog_name="megadistill", standalone_mode=False, obj=_ONLY_READ)
    except typer.TyperException as error:
        raise ValueError(f"{key}: {error.format_message()}") from None


def existing_run(path: str) -> "RunDir":
    """The run in a directory. Raises `ValueError` when there is none."""
    from megadistill.rundir import RunDir

    run = RunDir(Path(path).absolute())
    if not run.config_file.exists():
        raise ValueError(f"{path}: found no config.yaml, expected a run directory")
    return run


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"megadistill {megadistill.__version__}")
        raise typer.Exit


@app.callback(epilog="\b\nExample: megadistill recipes list")
def _root(
    _version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    """On-policy distillation on Slurm."""
