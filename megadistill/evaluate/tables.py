"""The table of a comparison, systems by benchmarks: as Markdown, CSV, LaTeX, HTML and a picture."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from megadistill import plots, stats
from megadistill.evaluate.protocol import Block

BLOCKS: dict[Block, str] = {
    "general": "General",
    "domain": "Domain",
    "heldout": "Held out (nats per token, less is better)",
}
ABSENT = "–"  # noqa: RUF001 - a dash, as tables have it
AVERAGE = "average"
UNITS = {"score, points": True, "nats per token, less is better": False}
RADAR_FROM = 3
"""Fewer axes make no shape."""
COLUMNS = (
    *("system", "block", "benchmark", "title", "items", "is_share", "higher_is_better"),
    *("score", "low", "high", "p_adjusted", "answers", "holes", "remark"),
)
"""`score` is NaN where there is none, for the reason that `remark` says; beside a score that says what
became of some answers, `holes` being those that have none."""
STYLE = (
    "table{border-collapse:collapse;font-family:sans-serif}td,th{padding:.3em .8em;"
    "border-bottom:1px solid #ccc}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Scores with what is known of their differences to the first system's, the baseline's."""

    frame: pd.DataFrame
    """A row a score: COLUMNS, `mark` (+ significantly better than the baseline, - worse), `is_best`."""
    systems: Sequence[str]
    confidence: float
    remarks: Sequence[str] = ()
    """Sentences that stand below."""

    @property
    def note(self) -> str:
        """What the marks mean."""
        level = 1 - self.confidence
        nats = "" if self.frame.is_share.all() else ", KL and NLL in nats"
        marks = (
            f"Scores in points{nats} with {self.confidence:.0%} intervals. + / - : better / worse than "
            f"{self.systems[0]} at {level:.2g} (paired tests on the same items, Holm over the table)."
        )
        return " ".join([marks, *self.remarks])


def mark(rows: Sequence[Mapping[str, Any]], confidence: float) -> pd.DataFrame:
    """Rows of COLUMNS as a table's frame: p-values adjusted for their number, marks, best scores.

    The baseline's rows come first in each benchmark and have no p-value (NaN).
    """
    frame = pd.DataFrame(rows, columns=COLUMNS)
    tested = frame.p_adjusted.notna()
    frame.loc[tested, "p_adjusted"] = stats.holm(frame.p_adjusted[tested].tolist())
    frame["rank"] = np.where(frame.higher_is_better, 1, -1) * frame.score
    found = frame.groupby("benchmark")["rank"]
    signs = np.where(
        frame["rank"] > found.transform("first"), "+", "-"
    )  # those tested have a first
    frame["mark"] = np.where(frame.p_adjusted < 1 - confidence, signs, "")
    frame["is_best"] = (frame["rank"] == found.transform("max")) & (found.transform("count") > 1)
    blocks = frame.block.map(list(BLOCKS).index)
    return frame.loc[blocks.sort_values(kind="stable").index]


def markdown(table: Table) -> str:
    """One row a system; the best score of a column in bold."""
    frame = _texts(table, "{score} [{low}, {high}] {mark}", "**{}**", "{title} (n={items})")
    heads = [f"{block} average" if title == AVERAGE else title for block, title in frame.columns]
    lines = [["system", *heads], ["---"] * (1 + len(heads)), *frame.reset_index().to_numpy()]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", table.note, ""])


def comma_separated(table: Table) -> str:
    """One row a score, for programs."""
    systems = pd.Categorical(table.frame.system, table.systems)
    shown = _shown(table.frame).map("{:.4f}".format, na_action="ignore")
    frame = table.frame.assign(system=systems, **shown).sort_values("system", kind="stable")
    frame["p_adjusted"] = frame.p_adjusted.map("{:.6g}".format, na_action="ignore")
    names = ["system", "block", "benchmark", "items", "score", "low", "high", "p_adjusted", "mark"]
    names += ["answers", "holes", "remark"]
    return str(frame[names].to_csv(index=False))


def latex(table: Table) -> str:
    """A booktabs table."""
    form = r"{score}$^{{{mark}}}$ {{\scriptsize [{low}, {high}]}}"
    frame = _texts(table, form, r"\textbf{{{}}}", "{title}", _escape_latex)
    text = frame.to_latex(
        escape=False, column_format="l" + "c" * frame.shape[1], multicolumn_format="c"
    )
    return f"{text}% {table.note}\n".replace("$^{}$", "").replace(ABSENT, "--")


def hypertext(table: Table) -> str:
    """A page that needs nothing else."""
    form = "{score}<sup>{mark}</sup> <small>[{low}, {high}]</small>"
    frame = _texts(table, form, "<b>{}</b>", "{title}", html.escape)
    return (
        f'<!doctype html><meta charset="utf-8"><style>{STYLE}</style>\n'
        f"{frame.to_html(escape=False, border=0)}\n<p>{html.escape(table.note)}</p>\n"
    )


RENDERERS: Mapping[str, Callable[[Table], str]] = {
    "md": markdown,
    "csv": comma_separated,
    "tex": latex,
    "html": hypertext,
}


def draw(table: Table, file: Path) -> Path:
    """Bars with intervals, those in points and those in nats apart; and a radar of several in points."""
    scored = table.frame.dropna(subset="score")
    shown = _shown(scored).itertuples(index=False, name=None)
    cells = dict(zip(zip(scored.system, scored.benchmark, strict=True), shown, strict=True))
    panels: list[plots.Panel] = []
    radar: list[plots.Panel] = []
    for unit, is_share in UNITS.items():
        heads = table.frame[table.frame.is_share == is_share].drop_duplicates("benchmark")
        names, titles = heads.benchmark.tolist(), heads.title.tolist()
        bars = {s: [cells.get((s, name)) for name in names] for s in table.systems}
        if names:
            panels.append(plots.Bars(title=unit, heads=titles, series=bars))
        if is_share and len(names) >= RADAR_FROM:
            shapes = {s: [cell[0] if cell else 0.0 for cell in found] for s, found in bars.items()}
            radar = [plots.Radar(title="relative to the best", heads=titles, series=shapes)]
    return plots.save_png(file, panels + radar)


def _shown(frame: pd.DataFrame) -> pd.DataFrame:
    """Scores with their bounds in points or nats."""
    scale = np.where(frame.is_share, 100.0, 1.0)
    return frame[["score", "low", "high"]].mul(scale, axis=0)


def _texts(
    table: Table, cell: str, best: str, head: str, escape: Callable[[str], str] = str
) -> pd.DataFrame:
    """Systems by (block, title), and an average after each block in points.

    Divergences from different models have no average that means anything.
    """
    frame = table.frame.assign(text=_cells(table.frame, cell, best))
    blocks = {}
    for block, rows in frame.groupby("block", sort=False):
        heads = rows.drop_duplicates("benchmark")
        wide = rows.pivot(index="system", columns="benchmark").reindex(table.systems)
        found = wide["text"][heads.benchmark].fillna(ABSENT)
        titles = zip(map(escape, heads.title), heads["items"], strict=True)
        found.columns = [head.format(title=title, items=items) for title, items in titles]
        if rows.is_share.all():
            average = 100 * wide["score"][heads.benchmark].sum(axis=1, skipna=False) / len(heads)
            found[AVERAGE] = [ABSENT if np.isnan(mean) else f"{mean:.1f}" for mean in average]
        blocks[BLOCKS[block]] = found
    return (
        pd.concat(blocks, axis=1)
        .rename(index=escape)
        .rename_axis(index=None, columns=["", "system"])
    )


def _cells(frame: pd.DataFrame, cell: str, best: str) -> list[str]:
    """Each score with its bounds and its mark."""
    texts = []
    for row, shown in zip(frame.itertuples(), _shown(frame).to_dict("records"), strict=True):
        pattern = "{:.1f}" if row.is_share else "{:.3f}"
        numbers = {name: pattern.format(value) for name, value in shown.items()}
        text = cell.format(mark=row.mark, **numbers).strip()
        text = best.format(text) if row.is_best else text
        beside = f" ({row.remark})" if row.remark else ""
        texts.append(row.remark if np.isnan(row.score) else text + beside)
    return texts


def _escape_latex(text: str) -> str:
    for character in "&%$#_":
        text = text.replace(character, "\\" + character)
    return text.replace("‖", r"$\|$")
