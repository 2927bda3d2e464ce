"""Logs of inspect-ai and lm-evaluation-harness, read as scores of items.

    LOG.eval, LOG.json        of inspect-ai; LOG.eval#SCORER where several scored
    samples_TASK_DATE.jsonl   of lm-evaluation-harness (--log_samples), with results_DATE.json beside it;
                              ...jsonl#METRIC or ...jsonl#METRIC,FILTER where there are several

A pattern (samples_mmlu_*.jsonl) stands for the tasks of a group, whose items count the same.
"""

import json
import math
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from megadistill.data.files import read_rows

WORDS = {"c": 1, "p": 0.5, "i": 0, "n": 0, "yes": 1, "true": 1, "no": 0, "false": 0}
"""What inspect-ai's scorers say: correct, partial, incorrect, no answer."""
MEANS = ("accuracy", "mean")
"""Names of inspect-ai's metrics that are means over items, as this project's scores are."""
TOLERANCE = 1e-6
NO_LOG = (
    *(KeyError, TypeError, AttributeError, zipfile.BadZipFile),
    *(json.JSONDecodeError, UnicodeDecodeError),
)
"""What reading something else runs into."""
ZSTANDARD = 93
"""A compression of zip files, which inspect-ai uses and Python knows from 3.14 on."""
_SAMPLES = re.compile(r"samples_(.+)_(\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """One task's scores."""

    scores: Sequence[tuple[str, int, float]]
    """(item, sample, score); NaN: it could not be scored."""
    mean: float | None
    """By the log itself; None where it does not say."""
    whole_set: bool = True
    higher_is_better: bool = True


def read_logs(file: Path) -> list[Log]:
    """The logs that a place in the configuration means. Raises `ValueError` with what is wrong."""
    name, _, chosen = file.name.partition("#")
    files = sorted(file.parent.glob(name))
    if not files:
        raise ValueError(f"no file {file.with_name(name)}")
    logs = []
    for found in files:
        try:
            log = (_lm_eval if found.suffix == ".jsonl" else _inspect)(found, chosen)
        except NO_LOG as error:
            raise ValueError(f"{found}: no log of inspect-ai or lm-eval: {error!r}") from error
        _check(found, log)
        logs.append(log)
    return logs


def _check(file: Path, log: Log) -> None:
    """Only means of shares can stand in a table of points."""
    frame = pd.DataFrame(log.scores, columns=["item", "sample", "score"])
    given = frame.score.dropna()
    if given.empty or not given.between(0, 1).all():
        found = f"{len(frame)} scores from {frame.score.min():g} to {frame.score.max():g}"
        raise ValueError(f"{file}: found {found}, expected some from 0 to 1")
    mean = frame.groupby("item").score.mean().mean()
    if log.mean is not None and abs(mean - log.mean) > TOLERANCE:
        raise ValueError(
            f"{file}: found {log.mean:g} as its own result, expected the mean of the items, {mean:g}"
        )


def _choose(file: Path, kind: str, known: Sequence[str], chosen: str) -> str:
    """The one that is meant; METRIC means METRIC,FILTER where it has one filter."""
    meant = [name for name in known if chosen in (name, name.partition(",")[0], "")]
    if len(meant) != 1:
        raise ValueError(f"{file}: found {kind} {chosen!r}, expected #NAME with one of {known}")
    return meant[0]


def _inspect(file: Path, chosen: str) -> Log:
    if file.suffix == ".eval":
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            header = json.loads(_member(archive, members["header.json"]))
            names = [name for name in members if name.startswith("samples/")]
            samples = [json.loads(_member(archive, members[name])) for name in names]
    else:
        header = json.loads(file.read_text(encoding="utf-8"))
        samples = header["samples"]
    if header["status"] != "success":
        raise ValueError(f"{file}: found status {header['status']!r}, expected 'success'")
    scored = [sample for sample in samples if sample.get("scores")]
    scorer = _choose(file, "scorer", sorted({n for s in scored for n in s["scores"]}), chosen)
    task = header["eval"]["task"]
    found = [
        (f"{task}/{sample['id']}", sample["epoch"] - 1, _score(sample, scorer))
        for sample in samples
    ]
    results = [result for result in header["results"]["scores"] if result["name"] == scorer]
    results.sort(key=lambda result: result.get("reducer") not in (None, "mean"))  # those first
    means = [
        metric["value"]
        for result in results
        for name, metric in result["metrics"].items()
        if name in MEANS
    ]
    return Log(
        scores=found,
        mean=means[0] if means else None,
        whole_set=len({item for item, _, _ in found}) == header["eval"]["dataset"]["samples"],
    )


def _score(sample: Mapping[str, Any], scorer: str) -> float:
    """NaN where it failed, or the scorer did."""
    scores = sample.get("scores") or {}
    return _number(scores[scorer]["value"]) if scorer in scores else math.nan


def _number(value: Any) -> float:
    """Of what a scorer gave; raises `TypeError` for what is no number."""
    try:
        return float(WORDS.get(value.lower(), value) if isinstance(value, str) else value)
    except ValueError:
        raise TypeError(f"a score is {value!r}") from None


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.compress_type != ZSTANDARD:
        return archive.read(info)
    assert archive.fp is not None
    archive.fp.seek(info.header_offset)
    lengths = struct.unpack("<26xHH", archive.fp.read(30))  # of name and extra field
    archive.fp.seek(sum(lengths), 1)
    packed = pa.BufferReader(archive.fp.read(info.compress_size))
    with pa.CompressedInputStream(packed, "zstd") as stream:
        return bytes(stream.read())


def _lm_eval(file: Path, chosen: str) -> Log:
    named = _SAMPLES.fullmatch(file.name)
    if named is None:
        raise ValueError(f"{file}: expected the name samples_TASK_DATE.jsonl")
    task, date = named.groups()
    found: dict[str, list[tuple[str, int, float]]] = {}
    for row in read_rows(file):
        item = f"{task}/{row.values['doc_id']}/{row.values['doc_hash'][:16]}"
        for name, value in _metrics(row.values):
            found.setdefault(name, []).append((item, 0, value))
    metric = _choose(file, "metric", sorted(found), chosen)
    results_file = file.with_name(f"results_{date}.json")
    if not results_file.is_file():
        return Log(scores=found[metric], mean=None)
    results = json.loads(results_file.read_text(encoding="utf-8"))
    count = results["n-samples"][task]
    return Log(
        scores=found[metric],
        mean=results["results"][task][metric],
        whole_set=count["effective"] == count["original"],
        higher_is_better=results["higher_is_better"][task].get(metric.partition(",")[0])
        is not False,
    )


def _metrics(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Those whose value for an item is a number, named as in the results."""
    for name in row["metrics"]:
        if isinstance(row[name], int | float):
            yield f"{name},{row['filter']}", float(row[name])
