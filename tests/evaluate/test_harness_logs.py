"""Logs of inspect-ai and lm-evaluation-harness, in their formats, with scores known beforehand."""

import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from megadistill.evaluate.benchmarks import get_benchmark
from megadistill.evaluate.benchmarks.recorded import Recorded, read_recorded
from megadistill.evaluate.compare import make_table
from megadistill.evaluate.results import SUMMARY, Rules, summarise
from megadistill.evaluate.scoring import COLUMNS
from megadistill.refine.blocks import write_rows

DATE = "2026-11-29T00-27-47.310408"
Values = dict[str, Any]


def sample(number: int, epoch: int, **scores: Any) -> Values:
    found = {name: {"value": value, "answer": "7"} for name, value in scores.items()}
    return {"id": f"q{number}", "epoch": epoch, "input": "?", "target": "7", "scores": found}


def inspect_log(samples: Sequence[Values], means: Mapping[str, float], **changes: Any) -> Values:
    """The parts of an inspect-ai log that are read, and a few that are not."""
    results = [
        {"name": name, "scorer": name, "metrics": {"accuracy": {"name": "accuracy", "value": mean}}}
        for name, mean in means.items()
    ]
    return {
        "version": 2,
        "status": "success",
        "eval": {"task": "sums", "model": "m", "dataset": {"samples": 3}, "config": {"epochs": 2}},
        "results": {"total_samples": len(samples), "scores": results},
        "samples": list(samples),
    } | changes


SAMPLES = [
    *(sample(number, 1, match=value) for number, value in enumerate("CIP")),
    *(sample(number, 2, match=value) for number, value in enumerate("CCI")),
]
"""Items at 1, 0.5 and 0.25."""
LOG = inspect_log(SAMPLES, {"match": (1 + 0.5 + 0.25) / 3})


def write_json(file: Path, log: Values) -> Path:
    file.write_text(json.dumps(log))
    return file


def write_eval(file: Path, log: Values, *, zstandard: bool = False) -> Path:
    """As inspect-ai zips it; the compression of today's versions is not Python's before 3.14."""
    header = {name: value for name, value in log.items() if name != "samples"}
    members = {"_journal/start.json": {"version": 2}, "header.json": header}
    for one in log["samples"]:
        members[f"samples/{one['id']}_epoch_{one['epoch']}.json"] = one
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED if zstandard else zipfile.ZIP_DEFLATED) as z:
        for name, value in members.items():
            data = json.dumps(value).encode()
            z.writestr(name, pa.compress(data, "zstd", asbytes=True) if zstandard else data)
    if zstandard:  # the method stands 8 bytes into a member's header, 10 into its directory entry
        whole = bytearray(file.read_bytes())
        for magic, place in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
            at = whole.find(magic)
            while at >= 0:
                whole[at + place : at + place + 2] = struct.pack("<H", 93)
                at = whole.find(magic, at + 4)
        file.write_bytes(whole)
    return file


def scores(found: Recorded) -> dict[tuple[str, int], float]:
    return {(row["item"], row["sample"]): row["value"] for row in found.rows}


EXPECTED = {
    ("sums/q0", 0): 1.0,
    ("sums/q1", 0): 0.0,
    ("sums/q2", 0): 0.5,
    ("sums/q0", 1): 1.0,
    ("sums/q1", 1): 1.0,
    ("sums/q2", 1): 0.0,
}


def test_every_format_of_inspect_gives_the_same_scores(tmp_path: Path) -> None:
    files = [
        write_json(tmp_path / "a.json", LOG),
        write_eval(tmp_path / "a.eval", LOG),
        write_eval(tmp_path / "z.eval", LOG, zstandard=True),
    ]
    for file in files:
        found = read_recorded("sums", file)
        assert scores(found) == EXPECTED
        assert found.kind == "recorded"
        assert found.facts == {"title": "sums", "whole_set": True, "higher_is_better": True}


def test_a_scorer_is_chosen_and_what_it_could_not_score_is_counted(tmp_path: Path) -> None:
    samples = [
        sample(0, 1, match="C", grader=0.75),
        sample(1, 1, match=False, grader=float("nan")),
        sample(2, 1, match="no", grader="0.25"),
        {"id": "q3", "epoch": 1, "scores": None, "error": {"message": "timed out"}},
    ]
    log = inspect_log(samples, {"match": 1 / 3, "grader": 0.5})
    file = write_json(tmp_path / "two.json", log)
    with pytest.raises(ValueError, match=r"found scorer '', expected .* \['grader', 'match'\]"):
        read_recorded("sums", file)
    grader = read_recorded("sums", file.with_name("two.json#grader"))
    assert {row["item"]: row["hole"] for row in grader.rows} == {
        "sums/q0": None,
        "sums/q1": "not_scored",
        "sums/q2": None,
        "sums/q3": "not_scored",
    }
    found = summarise(grader.rows, "none")
    assert found.weights_I.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert (found.values_I[[0, 2]].tolist(), dict(found.holes)) == ([0.75, 0.25], {"not_scored": 2})
    match = read_recorded("sums", file.with_name("two.json#match"))
    assert list(scores(match).values())[:3] == [1.0, 0.0, 0.0]


def reduced(reducer: str, mean: float) -> Values:
    """The log with a result over the epochs that is no mean."""
    log = inspect_log(SAMPLES, {"match": mean})
    log["results"]["scores"][0]["reducer"] = reducer
    return log


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (reduced("pass_at_2", 1.0), "found 1 as its own result, expected the mean of the items"),
        (LOG | {"status": "error"}, "found status 'error', expected 'success'"),
        (inspect_log(SAMPLES, {"match": 0.9}), "found 0.9 as its own result, expected the mean"),
        (
            inspect_log([sample(0, 1, match=7)], {}),
            "found 1 scores from 7 to 7, expected some from 0 to 1",
        ),
        (inspect_log([sample(0, 1, match={"a": 1})], {}), "no log of inspect-ai or lm-eval"),
        (inspect_log([sample(0, 1, match="good")], {}), "a score is 'good'"),
        (inspect_log([], {"match": 0.5}), r"found scorer '', expected #NAME with one of \[\]"),
        ({"something": "else"}, "no log of inspect-ai or lm-eval: KeyError"),
    ],
    ids=["reducer", "status", "mean", "range", "parts", "word", "none", "other"],
)
def test_what_cannot_stand_in_the_table_is_refused(
    tmp_path: Path, log: Values, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_recorded("sums", write_json(tmp_path / "log.json", log))


def write_lm_eval(folder: Path, task: str, values: Sequence[float], **changes: Any) -> Path:
    """Samples with two metrics, one of them with two filters, and the results beside them."""
    folder.mkdir(exist_ok=True)
    rows = [
        {
            "doc_id": number,
            "doc": {"q": number},
            "doc_hash": f"{number:064x}",
            "filter": name,
            "metrics": ["exact_match", "bleu"],
            "exact_match": value if name == "strict" else 1.0,
            "bleu": ["reference", "answer"],
        }
        for name in ("strict", "loose")
        for number, value in enumerate(values)
    ]
    file = folder / f"samples_{task}_{DATE}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results_file = folder / f"results_{DATE}.json"
    known = json.loads(results_file.read_text()) if results_file.exists() else {}
    own = {
        "results": {"exact_match,strict": sum(values) / len(values), "exact_match,loose": 1.0},
        "n-samples": {"original": len(values), "effective": len(values)},
        "higher_is_better": {"exact_match": True},
    } | changes
    merged = {part: {**known.get(part, {}), task: value} for part, value in own.items()}
    results_file.write_text(json.dumps(merged))
    return file


def test_lm_evals_samples_are_read_by_metric_and_filter(tmp_path: Path) -> None:
    file = write_lm_eval(tmp_path, "gsm8k", [1.0, 0.0, 1.0])
    for chosen in ("", "#exact_match"):
        with pytest.raises(ValueError, match=r"\['exact_match,loose', 'exact_match,strict'\]"):
            read_recorded("gsm8k", file.with_name(file.name + chosen))
    found = read_recorded("gsm8k", file.with_name(f"{file.name}#exact_match,strict"))
    assert list(scores(found).values()) == [1.0, 0.0, 1.0]
    assert found.facts["whole_set"]
    counts = {"original": 1319, "effective": 3}
    file = write_lm_eval(tmp_path, "gsm8k", [1.0], **{"n-samples": counts})
    found = read_recorded("gsm8k", file.with_name(f"{file.name}#exact_match,loose"))
    assert not found.facts["whole_set"]


def test_a_pattern_puts_the_tasks_of_a_group_together(tmp_path: Path) -> None:
    write_lm_eval(tmp_path, "mmlu_law", [1.0, 0.0])
    write_lm_eval(tmp_path, "mmlu_virology", [0.0])
    found = read_recorded("mmlu", tmp_path / "samples_mmlu_*.jsonl#exact_match,strict")
    items = [item.rpartition("/")[0] for item, _ in scores(found)]
    assert items == ["mmlu_law/0", "mmlu_law/1", "mmlu_virology/0"]
    with pytest.raises(ValueError, match=r"no file .*samples_hellaswag"):
        read_recorded("hellaswag", tmp_path / "samples_hellaswag_*.jsonl")


def test_a_result_that_is_no_mean_of_items_is_refused(tmp_path: Path) -> None:
    file = write_lm_eval(tmp_path, "x", [1.0, 0.0], results={"exact_match,strict": 0.1})
    with pytest.raises(ValueError, match=r"expected the mean of the items, 0\.5"):
        read_recorded("x", file.with_name(f"{file.name}#exact_match,strict"))


def test_a_known_benchmarks_log_stands_in_its_place(tmp_path: Path) -> None:
    found = read_recorded("medqa", write_json(tmp_path / "log.json", LOG))
    assert found.kind == "medqa"
    assert get_benchmark(found.kind).block == "domain"
    assert "title" not in found.facts


def test_recorded_systems_are_compared_on_the_same_items(tmp_path: Path) -> None:
    """Less is better here: the system that errs less gets the +."""
    better = {"higher_is_better": {"exact_match": False}}
    systems = {}
    for name, values in {"base": [1.0] * 20, "mine": [0.0] * 15 + [1.0] * 5}.items():
        file = write_lm_eval(tmp_path / name, "errors", values, **better)
        found = read_recorded("errors", file.with_name(f"{file.name}#exact_match,strict"))
        write_rows(tmp_path / name / "errors.parquet", found.rows, COLUMNS)
        summary = {"benchmark": found.kind, "items": 20, **found.facts}
        (tmp_path / name / SUMMARY).write_text(json.dumps({"errors": summary}))
        systems[name] = [tmp_path / name]
    frame = make_table(systems, Rules()).frame
    assert frame.score.tolist() == [1.0, 0.25]
    assert frame["mark"].tolist() == ["", "+"]
    assert frame.is_best.tolist() == [False, True]
    # McNemar: 15 answers changed, all in one direction.
    assert frame.p_adjusted.tolist()[1] == pytest.approx(2 / 2**15)
