"""A few rollouts of a run, token by token: where the teacher agrees with the student and where not."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megadistill.config import RunConfig, resolve_path
from megadistill.metrics import read_metrics
from megadistill.rundir import RunDir

MOST_TOKENS = 320
"""Of a response that are shown."""
MOST_CHARACTERS = 600
"""Of a prompt."""
MOST_GROUPS = 8
SHADE_BOUNDS = (0.1, 0.5, 1.0, 2.0)
"""|gap| in nats from which a token is shaded, and shaded more."""

Decode = Callable[[Sequence[int]], list[str]]
"""Token ids to the text of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A sampled token as it is shown."""

    text: str
    shade: str
    """CSS class: p1 to p4 where the teacher finds it more probable, n1 to n4 less; empty between."""
    numbers: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One rollout."""

    why: str
    prompt: str
    tokens: Sequence[Token]
    num_hidden: int
    """Tokens that are left out."""
    mean_gap: float
    row: Mapping[str, Any]
    """What else is stored of it (any: a column each)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Examples of one branch at one step."""

    branch: str
    step: int
    examples: Sequence[Example]


def sample_groups(run: RunDir, config: RunConfig) -> list[Group]:
    """Examples of each branch's first and last step."""
    wanted = _steps_to_show(run)
    if not wanted:
        return []
    decode = load_decoder([Path(resolve_path(config.student.path)), run.export])
    groups = []
    for step, branch in wanted[:MOST_GROUPS]:
        examples = _examples(run.rollout_file(step), branch, decode)
        if examples:
            groups.append(Group(branch=branch, step=step, examples=examples))
    return groups


def shade(gap: float) -> str:
    """The CSS class of a token's gap."""
    strength = sum(abs(gap) >= bound for bound in SHADE_BOUNDS)
    return f"{'p' if gap > 0 else 'n'}{strength}" if strength else ""


def load_decoder(directories: Iterable[Path]) -> Decode:
    """By the tokenizer in the first directory that has one; without any, ids are shown as numbers."""
    from megadistill.data.tokenizer import load_tokenizer  # noqa: PLC0415 - slow to import

    for directory in directories:
        if not directory.is_dir():
            continue
        try:
            tokenizer = load_tokenizer(directory)
        except (OSError, ValueError):  # weights without a tokenizer
            continue
        return lambda ids: _texts(tokenizer, ids)
    return lambda ids: [f"<{number}>" for number in ids]


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the one before it, so that leading spaces stay."""
    texts = []
    before: list[int] = []
    for number in ids:
        both = str(tokenizer.decode([*before, number], clean_up_tokenization_spaces=False))
        alone = tokenizer.decode(before, clean_up_tokenization_spaces=False) if before else ""
        texts.append(both[len(alone) :] or both)
        before = [number]
    return texts


def _steps_to_show(run: RunDir) -> list[tuple[int, str]]:
    """(step, branch): the first and last of each branch whose rollouts are there."""
    steps: dict[str, list[int]] = {}
    for row in read_metrics(run.metrics_file):
        if run.rollout_file(row["step"]).exists():
            for branch in str(row.get("branch", "")).split("+"):
                steps.setdefault(branch, []).append(row["step"])
    return [
        (step, branch)
        for branch, found in steps.items()
        for step in dict.fromkeys((found[0], found[-1]))
    ]


def _examples(file: Path, branch: str, decode: Decode) -> list[Example]:
    try:
        rows = [row for row in pq.read_table(file).to_pylist() if row["branch"] == branch]
    except (pa.ArrowInvalid, OSError):  # cut short, or gone since
        return []
    gaps = [
        np.asarray(row["teacher_logprobs"], dtype=np.float64) - np.asarray(row["student_logprobs"])
        for row in rows
    ]
    means = [float(gap.mean()) if len(gap) else 0.0 for gap in gaps]
    return [
        _example(rows[index], gaps[index], " · ".join(why), decode)
        for index, why in _chosen(rows, means).items()
    ]


def _chosen(rows: Sequence[dict[str, Any]], means: Sequence[float]) -> dict[int, list[str]]:
    """Index of a rollout -> why it is shown."""
    everything = range(len(rows))
    selected = [index for index in everything if rows[index]["selected"]]
    unselected = [index for index in everything if not rows[index]["selected"]]
    scores = [row["score"] for row in rows]
    chosen: dict[int, list[str]] = {}
    for pick, among, values, why in (
        (min, everything, means, "worst to the teacher: lowest mean gap"),
        (max, everything, means, "best to the teacher: highest mean gap"),
        (max, selected, scores, "selected with the highest score"),
        (min, unselected, scores, "not selected, lowest score"),
    ):
        if among:
            chosen.setdefault(pick(among, key=values.__getitem__), []).append(why)
    return chosen


def _example(row: dict[str, Any], gap_R: Any, why: str, decode: Decode) -> Example:
    count = min(len(row["response_ids"]), MOST_TOKENS)
    texts = decode(row["response_ids"][:count])
    tokens = [
        Token(
            text=text,
            shade=shade(float(gap_R[index])),
            numbers=(
                f"gap {gap_R[index]:+.3f}: teacher {row['teacher_logprobs'][index]:.3f}, "
                f"student {row['student_logprobs'][index]:.3f}, "
                f"engine {row['rollout_logprobs'][index]:.3f}"
            ),
        )
        for index, text in enumerate(texts)
    ]
    return Example(
        why=why,
        prompt=_prompt(row["messages"]),
        tokens=tokens,
        num_hidden=len(row["response_ids"]) - count,
        mean_gap=float(gap_R.mean()) if len(gap_R) else 0.0,
        row=row,
    )


def _prompt(messages: Sequence[dict[str, str]]) -> str:
    """What the user said last."""
    text = str(messages[-1].get("content", "")) if messages else ""
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …"
