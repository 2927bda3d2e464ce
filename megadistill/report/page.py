"""`report.html`: all of a run on one page that needs nothing but itself. Everything is escaped."""

import base64
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import yaml

from megadistill.atomic import write_atomic
from megadistill.launch.attempts import (
    last_error,
    last_writes,
    read_attempts,
    read_nodes,
    run_state,
)
from megadistill.launch.on_export import read_evaluations
from megadistill.metrics import read_metrics
from megadistill.plots import Columns, Curves, svg
from megadistill.report.curves import phase_timeline, run_curves
from megadistill.report.effect import effect_table, effects
from megadistill.report.ledger import cost_ledger, ledger_table
from megadistill.report.samples import SHADE_BOUNDS, sample_groups
from megadistill.rundir import RunDir

TEMPLATES = Path(__file__).parent / "templates"
MOST_ATTEMPTS = 100
"""The newest are shown."""
MOST_DETAIL = 4000
"""Characters of a culprit's last lines."""


def write_page(run: RunDir, file: Path) -> Path:
    """Write the page of a run in whatever state it is; returns `file`."""
    config = run.look_at_config()
    rows = read_metrics(run.metrics_file)
    state, why = run_state(run)
    progress = run.read_progress()
    attempts = read_attempts(run)
    values = {
        "name": run.path.name,
        "state": state,
        "why": why,
        "step": progress.get("step", 0),
        "steps": config.steps,
        "attempts": attempts[-MOST_ATTEMPTS:],
        "num_attempts": len(attempts),
        "written": last_writes(run),
        "last_error": last_error(run),
        "nodes": read_nodes(run),
        "evaluations": read_evaluations(run),
        "effects": effect_table(effects(run)),
        "charts": shown(run_curves(rows).values()),
        "timeline": shown([phase_timeline(rows)]),
        "costs": ledger_table(cost_ledger(run, config)),
        "groups": sample_groups(run, config),
        "bounds": SHADE_BOUNDS,
        "refinement": refinement(run.report),
        "settings": yaml.safe_load(run.config_file.read_text(encoding="utf-8")),
    }
    write_atomic(file, render("run.html", values))
    return file


def render(template: str, values: dict[str, Any]) -> str:
    """Fill a template of this package; every value in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = svg
    environment.filters["number"] = number
    environment.filters["moment"] = moment
    environment.filters["tail"] = lambda text: text[-MOST_DETAIL:]
    return environment.get_template(template).render(**values, now=time.time())


def shown(panels: Iterable[Curves | Columns]) -> list[Curves | Columns]:
    """Those that have something to show."""
    return [panel for panel in panels if panel.legend]


def number(value: float | None, pattern: str = ",.1f") -> str:
    """A number for a table; a dash for one that is not known."""
    return "-" if value is None else format(value, pattern)


def moment(seconds: float | None) -> str:
    """A point in time by this machine's clock, as people write it."""
    if seconds is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def refinement(report: Path) -> str | None:
    """The document of refinement's diagnostics with its picture inside; None without any.

    It goes into a frame that runs nothing, so what it holds cannot reach the page around it.
    """
    file = report / "refinement.html"
    if not file.exists():
        return None
    fragment = file.read_text(encoding="utf-8", errors="replace")
    picture = report / "refinement.png"
    if picture.exists():
        data = base64.b64encode(picture.read_bytes()).decode()
        fragment = fragment.replace('src="refinement.png"', f'src="data:image/png;base64,{data}"')
    return render("refinement.html", {"fragment": fragment})
