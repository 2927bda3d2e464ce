"""What a shard runs, imported by the shard that needs it."""

# ruff: noqa: PLC0415 - the imports are what has to wait
from pathlib import Path

from megadistill.refine.entries import PlainArguments


def generate(directory: Path, arguments: PlainArguments) -> None:
    """Answers of a system to a part of a benchmark."""
    from megadistill.evaluate import generating

    generating.generate(directory, arguments.values)


def score(directory: Path, arguments: PlainArguments) -> None:
    """Scores of a system's answers."""
    from megadistill.evaluate import scoring

    scoring.score(directory, arguments.values)


def write_texts(directory: Path, arguments: PlainArguments) -> None:
    """Texts of a signal."""
    from megadistill.evaluate import heldout_metrics

    heldout_metrics.write_texts(directory, arguments.values)


def measure(directory: Path, arguments: PlainArguments) -> None:
    """Signals of a system."""
    from megadistill.evaluate import heldout_metrics

    heldout_metrics.measure(directory, arguments.values)


def run(directory: Path, arguments: PlainArguments) -> None:
    """A benchmark's own command."""
    from megadistill.evaluate import external

    external.run(directory, arguments.values)
