"""`megadistill report RUN ...`: what it prints and which files it writes."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megadistill.report.compare import write_comparison
from megadistill.report.effect import effect_picture, effect_table
from megadistill.report.page import write_page
from megadistill.report.tradeoff import trade_picture, trade_table
from megadistill.rundir import RunDir

FILE_WIDTH = 160
"""Columns of a table in a job's log, where no terminal says how many there are."""


def write_report(runs: Sequence[RunDir], picture: str | None, page: str | None) -> None:
    """The table of every run; of one its picture and page, of several the page that compares them,
    and a picture where one is asked for."""
    is_known = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if is_known else FILE_WIDTH)
    first = runs[0]
    for run in runs:
        run.report.mkdir(mode=0o700, exist_ok=True)
        console.print(effect_table(run))
    if len(runs) > 1:
        table = trade_table(runs)
        if table.row_count:
            console.print(table)
        if picture:
            drawn = trade_picture(runs, Path(picture))
            console.print(f"picture: {drawn}", soft_wrap=True, highlight=False, markup=False)
        written = write_comparison(runs, Path(page or first.report / "comparison.html"))
    else:
        drawn = effect_picture(first, Path(picture or first.report / "effect.png"))
        console.print(f"picture: {drawn}", soft_wrap=True, highlight=False, markup=False)
        written = write_page(first, Path(page or first.report / "report.html"))
    console.print(f"page: {written}", soft_wrap=True, highlight=False, markup=False)
