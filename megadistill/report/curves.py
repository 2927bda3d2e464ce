"""Which curves of the metrics are shown, for one run and for several over each other."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from megadistill.report.charts import Chart, Point, Series, draw_columns, draw_curves
from megadistill.report.effect import heldout_names
from megadistill.report.ledger import ACTIVITIES, timeline

Row = Mapping[str, Any]  # one line of metrics

METRICS = (
    ("loss", "loss"),
    ("gap", "mean gap, teacher minus student, nats"),
    ("gap_absolute", "mean |gap|, nats"),
    ("selected_fraction", "selected fraction"),
    ("entropy", "entropy of the student, nats"),
    ("grad_norm", "gradient norm"),
    ("raft/lambda", "λ of RAFT"),
    ("rollout/tokens_per_s", "sampled tokens per second"),
    ("train/tokens_per_s", "trained tokens per second"),
    ("memory/trainer_gib", "memory of the fullest trainer, GiB"),
)
"""(metric, title); some are logged once a step, some under each branch's name."""

LIKELIHOOD = "held-out answers: negative log-likelihood, nats per token"

FIRST_BRANCHES = ("general", "domain")
"""These have the same colour in every picture."""


def run_charts(rows: Sequence[Row]) -> list[Chart]:
    """The curves of one run, coloured by branch."""
    names = heldout_names([dict(row) for row in rows])
    colours = _colours([*names, *_branches(rows)])
    held = draw_curves(
        "held-out KL(student ‖ teacher), nats per token",
        [
            Series(
                name=f"to {name} teacher", points=heldout_points(rows, name), colour=colours[name]
            )
            for name in names
        ],
    )
    likelihood = draw_curves(
        LIKELIHOOD,
        [
            Series(name=name, points=heldout_points(rows, name, "nll"), colour=colours[name])
            for name in names
        ],
    )
    charts = [held, likelihood]
    for key, title in METRICS:
        charts.append(draw_curves(title, _by_branch(rows, key, colours)))
    return [chart for chart in charts if chart is not None]


def compared_charts(runs: Sequence[tuple[str, Sequence[Row]]]) -> list[Chart]:
    """The curves of several runs over each other, coloured by run."""
    every = [dict(row) for _, rows in runs for row in rows]
    charts = [
        draw_curves(
            f"held-out {name}: KL(student ‖ teacher), nats per token",
            _by_run(runs, partial(heldout_points, name=name)),
        )
        for name in heldout_names(every)
    ]
    charts += [
        draw_curves(
            f"{name}: {LIKELIHOOD}",
            _by_run(runs, partial(heldout_points, name=name, quantity="nll")),
        )
        for name in heldout_names(every)
    ]
    for key, title in METRICS:
        plain = any(key in row for row in every)
        found = [key] if plain else [f"{branch}/{key}" for branch in _branches(every)]
        for metric in found:
            label = title if plain else f"{metric.split('/')[0]}: {title}"
            charts.append(draw_curves(label, _by_run(runs, partial(metric_points, key=metric))))
    return [chart for chart in charts if chart is not None]


def phase_timeline(rows: Sequence[Row]) -> Chart | None:
    """Seconds of each step by activity."""
    plain = [dict(row) for row in rows]
    return draw_columns("seconds of each step", [*ACTIVITIES, "other"], timeline(plain))


def heldout_points(rows: Sequence[Row], name: str, quantity: str = "reverse_kl") -> list[Point]:
    """A held-out quantity by step, with its standard error."""
    key = f"heldout/{name}/{quantity}"
    return [
        Point(x=row["step"], y=row[key], error=row.get(f"{key}_stderr", 0.0))
        for row in rows
        if key in row
    ]


def metric_points(rows: Sequence[Row], key: str) -> list[Point]:
    """A metric by step."""
    return [Point(x=row["step"], y=row[key]) for row in rows if key in row]


def _by_branch(rows: Sequence[Row], key: str, colours: Mapping[str, int]) -> Iterable[Series]:
    """A curve for each branch: its own metric, or the step's where it was the only branch."""
    for branch in _branches(rows):
        points = metric_points(rows, f"{branch}/{key}")
        if not points:
            points = metric_points([row for row in rows if row.get("branch") == branch], key)
        yield Series(name=branch, points=points, colour=colours[branch])
    joint = [row for row in rows if "+" in str(row.get("branch", ""))]
    if points := metric_points(joint, key):
        yield Series(name="together", points=points, colour=colours["together"])


def _by_run(
    runs: Sequence[tuple[str, Sequence[Row]]], points: Callable[[Sequence[Row]], list[Point]]
) -> list[Series]:
    return [
        Series(name=name, points=points(rows), colour=index)
        for index, (name, rows) in enumerate(runs)
    ]


def _branches(rows: Iterable[Row]) -> list[str]:
    """Names of the branches that were active, in order of their first step."""
    found = [
        branch
        for row in rows
        for branch in str(row.get("branch", "")).split("+")
        if branch not in ("", "start")
    ]
    return list(dict.fromkeys(found))


def _colours(names: Iterable[str]) -> dict[str, int]:
    ordered = dict.fromkeys([*FIRST_BRANCHES, *names, "together"])
    return {name: index for index, name in enumerate(ordered)}
