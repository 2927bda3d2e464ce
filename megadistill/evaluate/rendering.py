"""A table as Markdown, CSV, LaTeX and HTML."""

import csv
import html
import io
from collections.abc import Callable, Mapping

from megadistill.evaluate.tables import BLOCKS, Column, Table

ABSENT = "–"  # noqa: RUF001 - a dash, as tables have it


def markdown(table: Table) -> str:
    """One row a system; the best score of a column in bold."""
    header = ["system"]
    for block, columns in table.blocks:
        header += [f"{column.title} (n={column.num_items})" for column in columns]
        header += _average_head(columns, f"{BLOCKS[block]} average")
    lines = [header, ["---"] * len(header)]
    for system in table.systems:
        line = [system]
        for _, columns in table.blocks:
            for column in columns:
                text = _cell(table, system, column, "{value} [{low}, {high}] {mark}")
                line.append(f"**{text}**" if table.is_best(system, column) else text)
            line += _average(table, system, columns)
        lines.append(line)
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*rows, "", table.note, ""])


def comma_separated(table: Table) -> str:
    """One row a score, for programs."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = ["system", "block", "benchmark", "items", "score", "low", "high", "p_adjusted", "mark"]
    writer.writerow(names)
    for system in table.systems:
        for column in table.columns:
            cell = table.cells.get((system, column.name))
            if cell is None:
                continue
            given = (cell.interval.value, cell.interval.low, cell.interval.high)
            found = [f"{column.scale * value:.4f}" for value in given]
            p_value = "" if cell.p_value is None else f"{cell.p_value:.6g}"
            place = [system, column.block, column.name, column.num_items]
            writer.writerow([*place, *found, p_value, cell.mark])
    return stream.getvalue()


def latex(table: Table) -> str:
    """A booktabs table."""
    num_columns = sum(_width(columns) for _, columns in table.blocks)
    first, second = [""], ["System"]
    for block, columns in table.blocks:
        first.append(rf"\multicolumn{{{_width(columns)}}}{{c}}{{{BLOCKS[block]}}}")
        second += [_escape_latex(column.title) for column in columns]
        second += _average_head(columns, "Avg.")
    lines = [r"\begin{tabular}{l" + "c" * num_columns + "}", r"\toprule"]
    lines += [" & ".join(first) + r" \\", " & ".join(second) + r" \\", r"\midrule"]
    for system in table.systems:
        line = [_escape_latex(system)]
        for _, columns in table.blocks:
            for column in columns:
                form = r"{value}$^{{{mark}}}$ {{\scriptsize [{low}, {high}]}}"
                text = _cell(table, system, column, form).replace("$^{}$", "")
                best = table.is_best(system, column)
                line.append(rf"\textbf{{{text}}}" if best else text)
            line += _average(table, system, columns)
        lines.append(" & ".join(line) + r" \\")
    note = "% " + table.note
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", note, ""]).replace(ABSENT, "--")


def hypertext(table: Table) -> str:
    """A page that needs nothing else."""
    first, second = "<th></th>", "<th>system</th>"
    for block, columns in table.blocks:
        first += f'<th colspan="{_width(columns)}">{BLOCKS[block]}</th>'
        heads = [column.title for column in columns] + _average_head(columns, "average")
        second += "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    rows = [f"<tr>{first}</tr>", f"<tr>{second}</tr>"]
    for system in table.systems:
        line = f"<th>{html.escape(system)}</th>"
        for _, columns in table.blocks:
            for column in columns:
                form = "{value}<sup>{mark}</sup> <small>[{low}, {high}]</small>"
                kind = ' class="best"' if table.is_best(system, column) else ""
                line += f"<td{kind}>{_cell(table, system, column, form)}</td>"
            line += "".join(f"<td>{text}</td>" for text in _average(table, system, columns))
        rows.append(f"<tr>{line}</tr>")
    style = (
        "table{border-collapse:collapse;font-family:sans-serif}td,th{padding:.3em .8em;"
        "border-bottom:1px solid #ccc}.best{font-weight:bold}"
    )
    return (
        f'<!doctype html><meta charset="utf-8"><style>{style}</style>\n<table>\n'
        + "\n".join(rows)
        + f"\n</table>\n<p>{html.escape(table.note)}</p>\n"
    )


RENDERERS: Mapping[str, Callable[[Table], str]] = {
    "md": markdown,
    "csv": comma_separated,
    "tex": latex,
    "html": hypertext,
}


def _cell(table: Table, system: str, column: Column, form: str) -> str:
    cell = table.cells.get((system, column.name))
    if cell is None:
        return ABSENT
    value, low, high = (
        column.shown(number)
        for number in (cell.interval.value, cell.interval.low, cell.interval.high)
    )
    return form.format(value=value, low=low, high=high, mark=cell.mark).strip()


def _average_head(columns: list[Column], text: str) -> list[str]:
    """Divergences from different models have no average that means anything."""
    return [text] if columns[0].in_points else []


def _width(columns: list[Column]) -> int:
    return len(columns) + len(_average_head(columns, ""))


def _average(table: Table, system: str, columns: list[Column]) -> list[str]:
    found = table.average(system, columns)
    return _average_head(columns, ABSENT if found is None else columns[0].shown(found))


def _escape_latex(text: str) -> str:
    for character in "&%$#_":
        text = text.replace(character, "\\" + character)
    return text.replace("‖", r"$\|$")
