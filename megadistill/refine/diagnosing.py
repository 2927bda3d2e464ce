"""Diagnostics of a refined set (ALGORITHMS 2.6, items 1-4, and how far judges agree): one shard.

R is the raw answer, F the refined one, B the base model's own answer to the question alone.
"""

import datetime
import logging
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from megadistill import stats
from megadistill.config.refine import DiagnoseConfig, EngineConfig, FilterConfig, RewriteConfig
from megadistill.data.pools import stable_hash
from megadistill.data.records import Record
from megadistill.data.tokenizer import answer_opening, chat_ids, load_tokenizer, text_ids
from megadistill.inference.engine import BatchEngine, start_batch_engine
from megadistill.inference.requests import (
    BatchRequest,
    SamplingParams,
    open_thought,
    without_thinking,
)
from megadistill.launch.shards import FAILED, Runtime
from megadistill.refine import answer_measures
from megadistill.refine.assembly import RefinedArguments, assemble, write_json
from megadistill.refine.blocks import Row, read_rows_of, write_rows
from megadistill.refine.fusing import PASSING
from megadistill.refine.records import load_records
from megadistill.refine.report import write_report
from megadistill.refine.similarity import Encoder, SentenceEncoder, Vectors, embed
from megadistill.resolve import resolve
from megadistill.rollout.seeds import seed_for
from megadistill.rollout.vllm_arguments import EngineSettings

log = logging.getLogger(__name__)

Values = dict[str, Any]  # what goes into the report: plain JSON values
NGRAMS = (1, 2, 3, 4)
MODEL_COLUMNS = {
    "id": "string",
    "base": "string",
    "raw_nll": "float64",
    "refined_nll": "float64",
    "raw_tokens": "int64",
    "refined_tokens": "int64",
}
"""What the model says of a record. An NLL is null where the text does not fit its context."""


class DiagnoseArguments(RefinedArguments):
    """A refined set, the model that wrote it, and the encoder that compares answers."""

    settings: DiagnoseConfig
    rewrite: RewriteConfig
    model: str
    """Hash of the files."""
    filter: FilterConfig
    encoder: str
    """Hash of the files."""
    accept: float | None
    date: datetime.date | None
    """Of the chat template."""
    seed: int
    engine: Runtime[EngineConfig]
    gpu: Runtime[bool]


def diagnose(directory: Path, arguments: DiagnoseArguments) -> None:
    """The shard: measures a sample and writes the report."""
    settings = arguments.settings
    file = directory / "model.parquet"
    if (directory / FAILED).exists():  # another refined set was measured
        file.unlink(missing_ok=True)
    provenance = assemble(arguments).provenance
    (directory / FAILED).unlink(missing_ok=True)
    if any(row["reason"] in PASSING for row in provenance):
        (directory / FAILED).touch()
    rows = sample(provenance, settings.sample, arguments.seed)
    records = {record.id: record for record in load_records(arguments.records.path)}
    if not file.exists():
        found = ask_model(rows, [records[row["id"]] for row in rows], arguments)
        write_rows(file, found, MODEL_COLUMNS)
    cases = pd.DataFrame({**r, **m} for r, m in zip(rows, read_rows_of(file), strict=True))
    threads = arguments.engine.threads
    encoder = SentenceEncoder(arguments.filter, gpu=arguments.gpu, threads=threads)
    values = measure(cases, encoder, arguments.accept, arguments.seed)
    values["examples"] = examples(cases, settings.examples)
    write_json(directory / "refinement.json", values)
    write_report(directory, values)


def sample(rows: Sequence[Row], size: int, seed: int) -> list[Row]:
    """Rows chosen by a hash of their ids, so that the same ones are chosen every time."""
    return sorted(rows, key=lambda row: stable_hash(f"{seed}/{row['id']}"))[:size]


def ask_model(
    rows: Sequence[Row],
    records: Sequence[Record],
    arguments: DiagnoseArguments,
) -> list[Values]:
    """B, and the NLL of R and F under the base model."""
    settings, most = arguments.rewrite, arguments.settings.base_max_tokens
    path = resolve("model", settings.model)
    tokenizer = load_tokenizer(path)
    prompts = [chat_ids(record.messages, tokenizer, date=arguments.date) for record in records]
    texts = {
        name: [text_ids(row[name], tokenizer) for row in rows] for name in ("original", "refined")
    }
    context = settings.max_prompt_tokens + max(settings.max_tokens, most)
    engine = start_batch_engine(
        EngineSettings(
            model=path,
            precision=settings.precision,
            max_model_len=context,
            gpu=arguments.gpu,
            limits=arguments.engine,
        )
    )
    requests = [
        BatchRequest(key=n, token_ids=ids, seed=seed_for(arguments.seed, 3, records[n].id))
        for n, ids in enumerate(prompts)
        if len(ids) + most <= context
    ]
    sampling = SamplingParams(
        temperature=settings.temperature, top_p=settings.top_p, max_tokens=most
    )
    opening = answer_opening(tokenizer)
    base = {}
    for response in engine.generate(requests, sampling):
        text = str(tokenizer.decode(list(response.token_ids), skip_special_tokens=True))
        base[response.key] = without_thinking(open_thought(opening, text))
    nll = {name: fitting_nll(engine, prompts, ids, context) for name, ids in texts.items()}
    engine.close()
    return [
        {
            "id": row["id"],
            "base": base.get(n),
            "raw_nll": nll["original"][n],
            "refined_nll": nll["refined"][n],
            "raw_tokens": len(texts["original"][n]),
            "refined_tokens": len(texts["refined"][n]),
        }
        for n, row in enumerate(rows)
    ]


def fitting_nll(
    engine: BatchEngine,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    context: int,
) -> list[float | None]:
    """Mean NLL of each answer after its prompt; None where both do not fit the context."""
    joined = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    fit = [n for n, ids in enumerate(joined) if len(ids) < context and answers[n]]
    means = engine.mean_nll([(joined[n], len(answers[n])) for n in fit])
    by_place = dict(zip(fit, means, strict=True))
    return [by_place.get(n) for n in range(len(joined))]


def measure(cases: pd.DataFrame, encoder: Encoder, accept: float | None, seed: int) -> Values:
    """Every figure of the report; a case is a row of the provenance joined with MODEL_COLUMNS."""
    both = cases.dropna(subset=["raw_nll", "refined_nll"])
    changed = cases[cases.original != cases.refined]
    nll = {name: both[name].tolist() for name in ("raw_nll", "refined_nll")}
    lengths = {n: cases[n].astype(float).tolist() for n in ("raw_tokens", "refined_tokens")}
    ratios = cases.refined_tokens / cases.raw_tokens.clip(lower=1)
    return {
        "records": len(cases),
        "changed": len(changed),
        "embedding": embedding_figures(cases, encoder),
        "base_nll": {
            **(stats.compare_paired(nll["raw_nll"], nll["refined_nll"], seed) if len(both) else {}),
            "values": nll,
        },
        "overlap": overlap_figures(changed),
        "length": {
            "mean_ratio": float(ratios.to_numpy().mean()),
            **stats.compare_distributions(*lengths.values()),
            "values": lengths,
        },
        "style": style_figures(cases, seed),
        "judges": judge_figures(cases, accept),
        "similarity": cases.similarity.dropna().tolist(),
    }


def embedding_figures(cases: pd.DataFrame, encoder: Encoder) -> Values:
    """Mean 1 - cos(R, F); MMD^2 of R and of F to B, with one bandwidth."""
    raw, refined = (embed(list(cases[name]), encoder) for name in ("original", "refined"))
    divergence = 1 - np.einsum("nd,nd->n", raw, refined)
    changed = divergence[(cases.original != cases.refined).to_numpy()]
    values: Values = {
        "divergence": float(divergence.mean()),
        "divergence_of_changed": float(changed.mean()) if len(changed) else None,
    }
    keep = [n for n, text in enumerate(cases.base.fillna("")) if text]
    if len(keep) < 2:
        return values
    base = embed(list(cases.base.iloc[keep]), encoder)
    return values | mmd_figures(raw[keep], refined[keep], base)


def mmd_figures(raw: Vectors, refined: Vectors, base: Vectors) -> Values:
    """How far the raw and the refined answers are from the base model's own, as sets."""
    bandwidth = stats.median_distance(np.concatenate([raw, refined, base]))
    before = stats.mmd2(raw, base, bandwidth)
    after = stats.mmd2(refined, base, bandwidth)
    return {
        "bandwidth": bandwidth,
        "mmd2_raw": before,
        "mmd2_refined": after,
        "mmd2_drop": before - after,
    }


def overlap_figures(changed: pd.DataFrame) -> Values:
    """How much of F stands in R already, over the changed records."""
    words = changed[["refined", "original"]].map(answer_measures.words_of).to_numpy().tolist()
    found: dict[str, list[float | None]] = {
        f"containment_{n}": [answer_measures.containment(new, old, n) for new, old in words]
        for n in NGRAMS
    }
    found["rouge_l"] = [answer_measures.rouge_l(new, old) for new, old in words]
    found["copy_rate"] = [answer_measures.copy_rate(new, old) for new, old in words]
    return {
        name: float(np.mean(given)) if (given := [v for v in values if v is not None]) else None
        for name, values in found.items()
    }


def style_figures(cases: pd.DataFrame, seed: int) -> Values:
    """Headings, lists and bold per 100 tokens in R and F, with a paired test."""
    raw = list(map(answer_measures.style_of, cases.original, cases.raw_tokens))
    new = list(map(answer_measures.style_of, cases.refined, cases.refined_tokens))
    return {
        name: stats.compare_paired([r[name] for r in raw], [n[name] for n in new], seed)
        for name in answer_measures.STYLE
    }


def judge_figures(cases: pd.DataFrame, accept: float | None) -> Values:
    """Scores of each judge, and how far every two agree."""
    if accept is None:
        return {}
    candidates = [
        {given["judge"]: given["score"] for given in candidate["scores"]}
        for found in cases.candidates.dropna()
        for candidate in found
    ]
    rounds = cases["round"].dropna().astype(int).value_counts().sort_index()
    frame = pd.DataFrame(candidates, dtype=np.float64)
    frame = frame[sorted(frame)]
    return {
        "candidates": len(candidates),
        "scores": {judge: frame[judge].dropna().tolist() for judge in frame},
        "rounds": {str(number): int(count) for number, count in rounds.items()},
        "agreement": judge_agreement(frame, accept),
    }


def judge_agreement(scores: pd.DataFrame, accept: float) -> list[Values]:
    """How far every two judges, the columns, agree over what both scored."""
    rows = []
    for pair in map(list, combinations(scores, 2)):
        first, second = scores[pair].dropna().to_numpy().T
        if len(first):
            rows.append({"judges": pair, **stats.agreement(first, second, accept)})
    return rows


def examples(cases: pd.DataFrame, count: int) -> dict[str, list[Values]]:
    """The changed records that moved furthest from and stayed nearest to their answers."""
    fields = ["id", "question", "original", "rewrite", "refined", "similarity", "decision"]
    changed = cases[cases.original != cases.refined].sort_values("similarity", kind="stable")[
        fields
    ]
    chosen = {"worst": changed[:count], "best": changed[::-1][:count]}
    return {kind: some.to_dict("records") for kind, some in chosen.items()}
