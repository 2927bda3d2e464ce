"""Held-out texts, and what the training engine says of them for one system.

The texts are a teacher's own answers or the pool's, written once and the same for every system.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from megadistill.config.evaluate import SignalConfig
from megadistill.config.refine import ServedConfig
from megadistill.config.schema import DataConfig
from megadistill.convert.hf_files import resolve_model
from megadistill.data.pools import answer_ids, make_pools
from megadistill.evaluate.scoring import COLUMNS
from megadistill.inference.engine import start_batch_engine
from megadistill.inference.requests import BatchRequest, SamplingParams
from megadistill.megatron.frozen import FrozenModels
from megadistill.refine.blocks import read_rows_of, write_rows
from megadistill.refine.prompts import load_tokenizer
from megadistill.refine.stages import Stage
from megadistill.rollout.seeds import seed_for
from megadistill.rollout.vllm_arguments import EngineSettings
from megadistill.types import Prompt, TokenSpan

TEXTS = "texts.parquet"
TEXT_COLUMNS = {
    "item": "string",
    "messages": "string",
    "token_ids": pa.list_(pa.int32()),
    "num_scored": "int64",
}
_DATA: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)
_SIGNAL: TypeAdapter[SignalConfig] = TypeAdapter(SignalConfig)
_MODEL: TypeAdapter[ServedConfig] = TypeAdapter(ServedConfig)
Row = dict[str, Any]  # as the columns say


def write_texts(directory: Path, arguments: Mapping[str, Any]) -> None:
    """The shard: the texts of one signal. See `signals` for the arguments."""
    runtime = Stage.of(directory).runtime
    signal = _SIGNAL.validate_python(arguments["signal"])
    data = _DATA.validate_python(arguments["data"])
    model = _model(runtime, arguments["writer"])
    tokenizer = load_tokenizer(resolve_model(model.path))
    pool = make_pools(data, tokenizer, 0, [signal.pool])[signal.pool]
    prompts = pool.heldout[: signal.prompts]
    if not prompts:
        raise ValueError(
            f"data.pools.{signal.pool}: no prompt is held out; raise data.heldout_fraction"
        )
    if signal.teacher is None:
        texts = [answer_ids(prompt, tokenizer)[: signal.max_tokens] for prompt in prompts]
    else:
        seeds = [seed_for(arguments["seed"], 0, prompt.id) for prompt in prompts]
        context = data.max_prompt_tokens + signal.max_tokens
        texts = sample(model, prompts, seeds, (context, signal.max_tokens), gpu=runtime["gpu"])
    rows = [
        {
            "item": prompt.id,
            "messages": json.dumps(prompt.messages, ensure_ascii=False),
            "token_ids": [*prompt.token_ids, *text],
            "num_scored": len(text),
        }
        for prompt, text in zip(prompts, texts, strict=True)
        if text
    ]
    write_rows(directory / TEXTS, rows, TEXT_COLUMNS)


def sample(
    model: ServedConfig,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    lengths: tuple[int, int],
    *,
    gpu: bool,
) -> list[list[int]]:
    """One answer of the teacher to each prompt, as it speaks (temperature 1).

    `lengths`: of the context, and of an answer.
    """
    context, most = lengths
    engine = start_batch_engine(
        EngineSettings(
            model=resolve_model(model.path),
            precision=model.precision,
            max_model_len=context,
            gpu=gpu,
            limits=model.engine,
        )
    )
    requests = [
        BatchRequest(key=number, token_ids=prompt.token_ids, seed=seed)
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    sampling = SamplingParams(temperature=1.0, max_tokens=most)
    found = {r.key: list(r.token_ids) for r in engine.generate(requests, sampling)}
    engine.close()
    return [found[number] for number in range(len(prompts))]


def measure(directory: Path, arguments: Mapping[str, Any]) -> None:
    """The shard: every signal of one system, a file each. See `signals` for the arguments."""
    stage = Stage.of(directory)
    runtime, system = stage.runtime, arguments["system"]
    signals = {n: _SIGNAL.validate_python(given) for n, given in arguments["signals"].items()}
    names = [system, *(s.teacher for s in signals.values() if s.kind != "nll" and s.teacher)]
    models = {name: _model(runtime, name) for name in names}
    tokenizer = load_tokenizer(resolve_model(models[system].path))
    for writer in sorted(set(arguments["writers"].values())):
        other = load_tokenizer(resolve_model(_model(runtime, writer).path))
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"signals: {system} and {writer} have different tokenizers, expected the same"
            )
    engine = FrozenModels(
        {name: (resolve_model(model.path), model.precision) for name, model in models.items()},
        gpu=runtime["gpu"],
        threads=models[system].engine.threads,
    )
    for name, signal in signals.items():
        (folder,) = stage.outputs("texts", [arguments["texts"][name]])
        texts = read_rows_of(folder / TEXTS)
        values = values_of(engine, system, signal, texts)
        rows = [
            to_row(text, value, str(tokenizer.decode(text["token_ids"][-text["num_scored"] :])))
            for text, value in zip(texts, values, strict=True)
        ]
        write_rows(directory / f"{name}.parquet", rows, COLUMNS)
    engine.close()


def values_of(
    engine: FrozenModels, system: str, signal: SignalConfig, texts: Sequence[Row]
) -> list[dict[str, float]]:
    """What the signal measures of each text under its own name, and beside it what came along."""
    spans = [
        TokenSpan(
            token_ids_N=np.asarray(text["token_ids"], np.int32), num_scored=text["num_scored"]
        )
        for text in texts
    ]
    if signal.kind == "nll":
        return [{"nll": float(value)} for value in engine.mean_nll(system, spans)]
    assert signal.teacher is not None
    forward, reverse = engine.divergences(system, signal.teacher, spans)
    order = {"forward_kl": forward, "reverse_kl": reverse}
    own = order.pop(signal.kind)
    ((other, others),) = order.items()
    return [
        {signal.kind: float(one), other: float(two)} for one, two in zip(own, others, strict=True)
    ]


def to_row(text: Row, values: Mapping[str, float], written: str) -> Row:
    """As scoring leaves it; the text stands where a transcript has the answer."""
    return {
        "item": text["item"],
        "sample": 0,
        "group": "all",
        "value": next(iter(values.values())),
        "weight": 1.0,
        "details": json.dumps(values),
        "messages": text["messages"],
        "written": written,
        "num_tokens": text["num_scored"],
        "finish_reason": "measured",
        "extracted": None,
        "replies": None,
    }


def _model(runtime: Mapping[str, Any], name: str) -> ServedConfig:
    known = {**runtime["models"], **runtime["systems"]}
    return _MODEL.validate_python(known[name])
