"""Selects and draws curves of the metrics, of one run or of several over each other."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megadistill.plots import Columns, Curves, Point, Series
from megadistill.report.ledger import SECONDS, spent

Row = Mapping[str, Any]  # one line of metrics

METRICS = {
    "loss": "loss",
    "gap": "mean gap, teacher minus student, nats",
    "gap_absolute": "mean |gap|, nats",
    "selected_fraction": "selected fraction",
    "token_share": "share of the trained tokens",
    "schedule_share": "share of the batch by the schedule",
    "schedule_factor": "factor of the schedule on a branch's loss",
    "counted": "mean weight of a token by the token rule",
    "divergence": "divergence from the teacher, nats",
    "student_mass": "probability of the student inside the top K",
    "top_k_overlap": "share of the top K that student and teacher have in common",
    "masked_fraction": "masked fraction",
    "entropy": "entropy of the student, nats",
    "grad_norm": "gradient norm",
    "raft/lambda": "λ of RAFT",
    "rollout/tokens_per_s": "sampled tokens per second",
    "train/tokens_per_s": "trained tokens per second",
    "memory/trainer_gib": "memory of the fullest trainer, GiB",
}
"""Metric -> title; some are logged once a step, some under each branch's name."""

LIKELIHOOD = "held-out answers: negative log-likelihood, nats per token"

FIRST_BRANCHES = ("general", "domain")
"""These have the same colour in every picture."""


def run_curves(rows: Sequence[Row]) -> dict[str, Curves]:
    """What is measured -> the curves of one run, coloured by branch."""
    names = heldout_names(rows)
    colours = _colours([*names, *_branches(rows)])
    return {
        "heldout": Curves(
            title="held-out KL(student ‖ teacher), nats per token",
            series=[
                Series(
                    f"to {name} teacher",
                    points_of(rows, f"heldout/{name}/reverse_kl"),
                    colours[name],
                )
                for name in names
            ],
        ),
        "likelihood": Curves(
            title=LIKELIHOOD,
            series=[
                Series(name, points_of(rows, f"heldout/{name}/nll"), colours[name])
                for name in names
            ],
        ),
        **{
            key: Curves(title=title, series=list(_by_branch(rows, key, colours)))
            for key, title in METRICS.items()
        },
    }


def compared_curves(runs: Sequence[tuple[str, Sequence[Row]]]) -> Iterator[Curves]:
    """The curves of several runs over each other, coloured by run."""
    every = [row for _, rows in runs for row in rows]
    names = heldout_names(every)
    titles = {
        f"heldout/{name}/reverse_kl": f"held-out {name}: KL(student ‖ teacher), nats per token"
        for name in names
    }
    titles |= {f"heldout/{name}/nll": f"{name}: {LIKELIHOOD}" for name in names}
    for key, title in METRICS.items():
        plain = any(key in row for row in every)
        for branch in [""] if plain else [f"{branch}/" for branch in _branches(every)]:
            titles[f"{branch}{key}"] = f"{branch.replace('/', ': ')}{title}"
    for key, title in titles.items():
        series = [
            Series(name, points_of(rows, key), index) for index, (name, rows) in enumerate(runs)
        ]
        yield Curves(title=title, series=series)


def phase_timeline(rows: Sequence[Row]) -> Columns:
    """Seconds of each step by activity."""
    seconds = spent(rows)[list(SECONDS)].to_numpy().tolist()
    return Columns(
        title="seconds of each step",
        names=[name.removesuffix(" s") for name in SECONDS],
        columns=[(str(row["step"]), values) for row, values in zip(rows, seconds, strict=True)],
    )


def measured_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows with a held-out measurement, first the one before training."""
    return [row for row in rows if any(key.startswith("heldout/") for key in row)]


def heldout_names(rows: Sequence[Row]) -> list[str]:
    """Names of the held-out measurements in the metrics."""
    return sorted({key.split("/")[1] for row in rows for key in row if key.startswith("heldout/")})


def points_of(rows: Sequence[Row], key: str) -> list[Point]:
    """A metric by step, with its standard error where there is one."""
    return [
        Point(row["step"], row[key], row.get(f"{key}_stderr", 0.0)) for row in rows if key in row
    ]


def _by_branch(rows: Sequence[Row], key: str, colours: Mapping[str, int]) -> Iterable[Series]:
    """A curve for each branch: its own metric, or the step's where it was the only branch."""
    for branch in _branches(rows):
        points = points_of(rows, f"{branch}/{key}")
        if not points:
            points = points_of([row for row in rows if row.get("branch") == branch], key)
        yield Series(branch, points, colours[branch])
    joint = [row for row in rows if "+" in str(row.get("branch", ""))]
    if points := points_of(joint, key):
        yield Series("together", points, colours["together"])


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
