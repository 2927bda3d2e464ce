"""Verbs of an evaluation: run it, and compare what several have found."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from megadistill.cli.verbs import Overrides, Source, Wait, family, verb
from megadistill.config import EvaluateConfig, load

evaluation = family(
    "eval",
    "Benchmarks, and tables that compare models. `eval CONFIG` is short for `eval run CONFIG`.",
    example="eval configs/eval/embedded.yaml",
    implied=True,
)


@verb(evaluation, example="eval run configs/eval/embedded.yaml cluster=null")
def run(config: Source, overrides: Overrides = None, wait: Wait = False) -> None:
    """Run benchmarks and make their table, or submit that as jobs; again, what is not done."""
    from megadistill.evaluate.pipeline import run_evaluation

    print(run_evaluation(load(EvaluateConfig, config, overrides or ()), wait=wait))


@verb(evaluation, example="eval compare base=RUN/results/a mine=RUN/results/b,RUN2/results/b")
def compare(
    systems: Annotated[
        list[str],
        Argument(
            metavar="[NAME=]DIR[,DIR...]",
            help="RUN/results/SYSTEM of each system, one of each seed; the baseline first",
        ),
    ],
    output: Annotated[str, Option(metavar="DIR", help="Where tables go.")] = "report",
    confidence: Annotated[float, Option(metavar="C", help="Of the intervals.")] = 0.95,
    most_holes: Annotated[
        float, Option(metavar="SHARE", help="Of answers without a score, at which there is one.")
    ] = 0.05,
) -> None:
    """Tables of systems that have results, from one run of `eval` or several."""
    from megadistill.evaluate.compare import parse_systems, write_tables
    from megadistill.evaluate.results import Rules

    rules = Rules(confidence, most_holes)
    print(write_tables(parse_systems(systems), Path(output), rules))
