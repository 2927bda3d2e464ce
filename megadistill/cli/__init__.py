"""The command line, one file a family of verbs. Each verb imports what it runs when it runs."""

from collections.abc import Sequence

from megadistill.cli import campaigns, configs, convert, evaluation, runs, sets
from megadistill.cli.verbs import app

__all__ = ["campaigns", "configs", "convert", "evaluation", "main", "runs", "sets"]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `megadistill`; a user's mistake ends with one message and code 2."""
    app(None if argv is None else list(argv), prog_name="megadistill")
