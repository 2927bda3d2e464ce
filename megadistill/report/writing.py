"""`megadistill report RUN ...`: what it prints and which files it writes."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megadistill.report.compare import write_comparison
from megadistill.report.effect import effect_picture, effect_table, effects
from megadistill.report.page import write_page
from megadistill.report.tradeoff import forgetting_curves, trade_picture, trade_table
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
        title = f"{run.path.name}: held out, nats per token"
        console.print(terminal_table(effect_table(effects(run)), title, num_texts=2))
    if len(runs) > 1:
        curves = forgetting_curves(runs)
        if curves:
            title = "gain on held-out answers, and KL to the start on held-out texts"
            console.print(terminal_table(trade_table(curves), title, num_texts=3))
        if picture:
            drawn = trade_picture(runs, Path(picture))
            console.print(f"picture: {drawn}", soft_wrap=True, highlight=False, markup=False)
        written = write_comparison(runs, Path(page or first.report / "comparison.html"))
    else:
        drawn = effect_picture(first, Path(picture or first.report / "effect.png"))
        console.print(f"picture: {drawn}", soft_wrap=True, highlight=False, markup=False)
        written = write_page(first, Path(page or first.report / "report.html"))
    console.print(f"page: {written}", soft_wrap=True, highlight=False, markup=False)


def terminal_table(frame: pd.DataFrame, title: str, num_texts: int) -> Table:
    """A table for a terminal; all but the first `num_texts` columns hold numbers."""
    table = Table(title=escape(title))
    for number, head in enumerate(frame.columns):
        table.add_column(head, justify="left" if number < num_texts else "right")
    for row in frame.itertuples(index=False):
        table.add_row(*map(escape, row))
    return table
