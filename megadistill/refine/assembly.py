"""The refined set: every record once, with its answer, where it comes from, and how it was chosen."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megadistill.atomic import write_atomic
from megadistill.config import RefineConfig
from megadistill.data.records import Record
from megadistill.inference.chat import Usage, cost_of
from megadistill.launch.shards import KnownFile, ShardArguments, Upstream
from megadistill.launch.stages import ShardedStage
from megadistill.refine.blocks import Row, read_blocks, sum_figures, write_rows
from megadistill.refine.fusing import COLUMNS as FUSION_COLUMNS
from megadistill.refine.fusing import PASSING
from megadistill.refine.records import load_records
from megadistill.refine.similarity import passes

log = logging.getLogger(__name__)

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
REFINED_COLUMNS = {
    "id": "string",
    "messages": MESSAGES,
    "question": "string",
    "answer": "string",
    "original": "string",
    "rewrite": "string",
    "filtered": "string",
    "decision": "string",
}
"""`answer` is the refined one. `rewrite` and `filtered` are the answers of a refinement that ends
sooner, for comparisons: the original where there is no usable rewrite, or none that passes."""
PROVENANCE_COLUMNS = {
    "id": "string",
    "question": "string",
    "original": "string",
    "written": "string",
    "rewrite": "string",
    "similarity": "float64",
    "candidates": FUSION_COLUMNS["candidates"],
    "round": "int64",
    "decision": "string",
    "reason": "string",
    "refined": "string",
    "usage": FUSION_COLUMNS["usage"],
    "hashes": "string",
}
"""`hashes` is JSON: the input's hash, and those of models and templates by stage."""
SWEEP = (0.0, 0.3, 0.5, 0.8, 1.0)
BINS = 20


class RefinedArguments(ShardArguments):
    """The stages of which a refined set is put together."""

    records: KnownFile
    rewrites: Upstream
    similarities: Upstream
    fused: Upstream | None
    """Absent: a rewrite that passes is the answer."""
    tau: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The rows of the refined set and of its provenance, and the rejected rows of the input."""

    refined: Sequence[Row]
    provenance: Sequence[Row]
    rejected: Sequence[Row]
    figures: Mapping[str, float]


def assemble(stages: RefinedArguments, hashes: str = "") -> Result:
    """Join the stages' rows; every record of the input comes out exactly once.

    `hashes`, JSON, says by what the stages compute.
    """
    records = load_records(stages.records.path)
    rewrites = read_blocks(stages.rewrites.outputs)
    similarities = read_blocks(stages.similarities.outputs)
    fused = None
    if stages.fused is not None:
        fused = {row["index"]: row for row in read_blocks(stages.fused.outputs)}
    refined, provenance = [], []
    for record, row, found in zip(records, rewrites, similarities, strict=True):
        assert row["index"] == found["index"] == record.index
        decided = decide(row, found["similarity"], fused, stages.tau)
        answers = {**row, **decided, "original": record.raw_answer}
        decided["refined"] = answers[decided["decision"]]
        refined.append(refined_row(record, row, decided))
        provenance.append(
            {
                "id": record.id,
                "question": record.question,
                "original": record.raw_answer,
                "written": row["written"],
                "rewrite": row["rewrite"],
                "similarity": found["similarity"],
                "hashes": hashes,
                **decided,
            }
        )
    assert len({row["id"] for row in refined}) == len(records), "ids are not unique"
    return Result(
        refined=refined,
        provenance=provenance,
        rejected=json.loads((stages.records.path.with_name("rejected.json")).read_text()),
        figures=sum_figures(stages.rewrites.outputs),
    )


def decide(row: Row, similarity: float | None, fused: Mapping[int, Row] | None, tau: float) -> Row:
    """Eq. (3) and (4) for one record: the decision with its reason, and what was fused."""
    kept: Row = {"decision": "original", "round": None, "candidates": None, "usage": None}
    if similarity is None:
        return kept | {"reason": row["reason"]}
    if not passes(similarity, tau):
        return kept | {"reason": "below_tau"}
    if fused is None:
        return kept | {"decision": "rewrite", "reason": None}
    fusion = fused[row["index"]]
    found = {name: fusion[name] for name in ("round", "candidates", "usage", "reason", "fused")}
    return found | {"decision": "original" if fusion["fused"] is None else "fused"}


def refined_row(record: Record, row: Row, decided: Row) -> Row:
    """A row that a training pool reads."""
    passed = decided["decision"] != "original" or decided["candidates"] is not None
    rewrite = record.raw_answer if row["rewrite"] is None else row["rewrite"]
    return {
        "id": record.id,
        "messages": [dict(turn) for turn in record.messages],
        "question": record.question,
        "answer": decided["refined"],
        "original": record.raw_answer,
        "rewrite": rewrite,
        "filtered": rewrite if passed else record.raw_answer,
        "decision": decided["decision"],
    }


def write_result(root: Path, result: Result) -> None:
    """The refined set as JSONL and Parquet, its provenance, and the rejected rows."""
    write_atomic(root / "refined.jsonl", _lines(result.refined))
    write_rows(root / "refined.parquet", result.refined, REFINED_COLUMNS)
    write_rows(root / "provenance.parquet", result.provenance, PROVENANCE_COLUMNS)
    write_atomic(root / "rejected.jsonl", _lines(result.rejected))


def write_summary(
    root: Path, config: RefineConfig, result: Result, stages: Sequence[ShardedStage]
) -> dict[str, Any]:
    """Counts, pass rate, tokens and cost, written and returned (any: JSON)."""
    rows = result.provenance
    found = [row["similarity"] for row in rows if row["similarity"] is not None]
    usage = sum_usage(rows)
    seconds = result.figures.get("seconds", 0.0)
    summary = {
        "rows_read": len(rows) + len(result.rejected),
        "rejected": dict(Counter(row["reason"] for row in result.rejected)),
        "records": len(rows),
        "decisions": dict(Counter(row["decision"] for row in rows)),
        "kept_original": dict(
            Counter(row["reason"] for row in rows if row["decision"] == "original")
        ),
        "similarity": similarity_figures(found, config.filter.tau),
        "rewriting": {
            **result.figures,
            "records_per_s": result.figures.get("records", 0) / seconds if seconds else None,
        },
        "models": {
            name: {**used, "cost": round(cost_of(used, config.models[name]), 6)}
            for name, used in usage.items()
        },
        "stages": {
            stage.name: {
                "shards": len(stage.shards),
                "seconds": round(sum(shard.seconds for shard in stage.states()), 3),
                "keys": [shard.key for shard in stage.shards],
            }
            for stage in stages
        },
    }
    write_json(root / "summary.json", summary)
    return summary


def similarity_figures(found: Sequence[float], tau: float) -> dict[str, Any]:
    """Histogram over -1 .. 1 and how many pass, at tau and at others (any: JSON)."""
    edges = [round(-1 + number / BINS, 6) for number in range(2 * BINS + 1)]
    counts, _ = np.histogram(found, edges)
    rates = {str(at): _rate(found, at) for at in sorted({*SWEEP, tau})}
    return {
        "measured": len(found),
        "tau": tau,
        "pass_rate": _rate(found, tau),
        "pass_rates": rates,
        "histogram": {"edges": edges, "counts": counts.tolist()},
    }


def _rate(found: Sequence[float], tau: float) -> float | None:
    return sum(passes(value, tau) for value in found) / len(found) if found else None


def sum_usage(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """What each model was asked in all."""
    total: dict[str, Counter[str]] = {}
    for row in rows:
        for used in row["usage"] or []:
            counts = {name: used[name] for name in Usage.__slots__}
            total.setdefault(used["model"], Counter()).update(counts)
    return {name: dict(counts) for name, counts in total.items()}


def describe(summary: Mapping[str, Any], root: Path) -> str:
    """The summary for people."""
    lines = [
        f"{summary['rows_read']} rows read: {summary['records']} records, "
        f"{sum(summary['rejected'].values())} rejected{_reasons(summary['rejected'])}",
        f"decisions: {_counts(summary['decisions'])}",
        f"original answer kept{_reasons(summary['kept_original'])}",
    ]
    if failed := sum(summary["kept_original"].get(reason, 0) for reason in PASSING):
        lines.append(f"{failed} answers could not be fused: the same command asks for them again")
    found = summary["similarity"]
    if found["measured"]:
        lines.append(
            f"similarity: {found['pass_rate']:.1%} of {found['measured']} rewrites reach "
            f"{found['tau']}"
        )
    for name, used in summary["models"].items():
        lines.append(
            f"{name}: {used['requests']} requests ({used['retries']} retries, {used['failed']} "
            f"given up, {used['unparsable']} without a score), {used['prompt_tokens']} + "
            f"{used['completion_tokens']} tokens, cost {used['cost']:g}"
        )
    lines.append(f"refined set: {root / 'refined.jsonl'}")
    return "\n".join(lines)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def _reasons(counts: Mapping[str, int]) -> str:
    return f" ({_counts(counts)})" if counts else ": none"


def copy_report(output: Path, report: Path) -> None:
    """Put the diagnostics where the run's report lies."""
    report.mkdir(mode=0o700, exist_ok=True)
    for file in sorted(output.glob("refinement.*")):
        shutil.copyfile(file, report / file.name)


def write_json(file: Path, values: Any) -> None:  # any: plain JSON values
    """Readable JSON, whole or absent."""
    write_atomic(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
