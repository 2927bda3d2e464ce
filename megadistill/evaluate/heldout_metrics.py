"""Held-out metrics of an evaluation, the configuration's `signals`: their shards and their columns.

The texts are a teacher's own answers or the pool's, written once and the same for every system; the
training engine scores them as it does during a run.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from megadistill.config import EvaluateConfig
from megadistill.config.evaluate import SignalConfig
from megadistill.config.refine import ServedConfig
from megadistill.config.schema import DataConfig
from megadistill.data.files import files_of
from megadistill.data.pools import answer_ids, make_pools
from megadistill.data.tokenizer import load_tokenizer
from megadistill.evaluate.benchmarks.recorded import scored
from megadistill.evaluate.heldout import measure_texts
from megadistill.evaluate.scoring import COLUMNS
from megadistill.inference.engine import start_batch_engine
from megadistill.inference.requests import BatchRequest, SamplingParams
from megadistill.launch.shards import fingerprint
from megadistill.megatron.frozen import FrozenModels
from megadistill.refine.blocks import read_rows_of, write_rows
from megadistill.refine.pipeline import identity
from megadistill.refine.stages import Stage
from megadistill.resolve import resolve
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
Arguments = dict[str, Any]  # plain JSON values


def measured_systems(config: EvaluateConfig) -> dict[str, ServedConfig]:
    """The systems that are directories, not endpoints."""
    return {n: model for n, model in config.systems.items() if isinstance(model, ServedConfig)}


def writer_of(config: EvaluateConfig, signal: SignalConfig) -> str:
    """Whose tokenizer writes the texts: the teacher's, or, for the pool's own answers, the first's."""
    return signal.teacher or next(iter(measured_systems(config)))


def text_arguments(config: EvaluateConfig, name: str) -> Arguments:
    """Of the shard that writes the texts of a signal; two signals on the same texts share it."""
    assert config.data is not None
    signal = config.signals[name]
    writer = writer_of(config, signal)
    kind = {} if signal.teacher is None else {"kind": "forward_kl"}
    pool = config.data.pools[signal.pool]
    data = _DATA.dump_python(config.data, mode="json")
    return {
        "signal": _SIGNAL.dump_python(signal, mode="json") | kind,
        "data": data | {"pools": {signal.pool: data["pools"][signal.pool]}},
        "files": [fingerprint(f) for source in pool.sources for f in files_of(source.location)],
        "writer": writer,
        "model": identity(_local(config, writer)),
        "seed": config.seed,
    }


def measure_arguments(config: EvaluateConfig, system: str, texts: Mapping[str, str]) -> Arguments:
    """Of the shard that measures a system; `texts`: signal -> key of its texts' shard."""
    teachers = {signal.teacher for signal in config.signals.values() if signal.teacher}
    return {
        "system": system,
        "model": identity(config.systems[system]),
        "teachers": {name: identity(_local(config, name)) for name in sorted(teachers)},
        "signals": {n: _SIGNAL.dump_python(s, mode="json") for n, s in config.signals.items()},
        "writers": {name: writer_of(config, signal) for name, signal in config.signals.items()},
        "texts": dict(texts),
    }


def title_of(signal: SignalConfig) -> str:
    """The head of its column."""
    match signal.kind:
        case "forward_kl":
            return f"KL({signal.teacher} ‖ system), {signal.pool}"
        case "reverse_kl":
            return f"KL(system ‖ {signal.teacher}), {signal.pool}"
    whose = f"{signal.teacher}'s answers" if signal.teacher else "reference answers"
    return f"NLL of {whose}, {signal.pool}"


def write_texts(directory: Path, arguments: Mapping[str, Any]) -> None:
    """The shard: the texts of one signal. See `text_arguments`."""
    runtime = Stage.of(directory).runtime
    signal = _SIGNAL.validate_python(arguments["signal"])
    data = _DATA.validate_python(arguments["data"])
    model = _model(runtime, arguments["writer"])
    tokenizer = load_tokenizer(model.path)
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
    engine = start_batch_engine(EngineSettings.of(model, gpu=gpu, max_model_len=context))
    requests = [
        BatchRequest(key=number, token_ids=prompt.token_ids, seed=seed)
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    sampling = SamplingParams(temperature=1.0, max_tokens=most)
    found = {r.key: list(r.token_ids) for r in engine.generate(requests, sampling)}
    engine.close()
    return [found[number] for number in range(len(prompts))]


def measure(directory: Path, arguments: Mapping[str, Any]) -> None:
    """The shard: every signal of one system, a file each. See `measure_arguments`."""
    stage = Stage.of(directory)
    runtime, system = stage.runtime, arguments["system"]
    signals = {n: _SIGNAL.validate_python(given) for n, given in arguments["signals"].items()}
    names = [system, *(s.teacher for s in signals.values() if s.kind != "nll" and s.teacher)]
    models = {name: _model(runtime, name) for name in names}
    tokenizer = load_tokenizer(models[system].path)
    for writer in sorted(set(arguments["writers"].values())):
        other = load_tokenizer(_model(runtime, writer).path)
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"signals: {system} and {writer} have different tokenizers, expected the same"
            )
    engine = FrozenModels(
        {name: (resolve("model", model.path), model.precision) for name, model in models.items()},
        gpu=runtime["gpu"],
        threads=models[system].engine.threads,
    )
    for name, signal in signals.items():
        (folder,) = stage.outputs("texts", [arguments["texts"][name]])
        texts = read_rows_of(folder / TEXTS)
        written = [str(tokenizer.decode(t["token_ids"][-t["num_scored"] :])) for t in texts]
        found = zip(rows_of(engine, system, signal, texts), written, strict=True)
        rows = [{**row, "written": text} for row, text in found]
        write_rows(directory / f"{name}.parquet", rows, COLUMNS)
    engine.close()


def rows_of(
    engine: FrozenModels, system: str, signal: SignalConfig, texts: Sequence[Row]
) -> Iterator[Row]:
    """Rows without what was written: the signal's value, and in the details what came along."""
    spans = [
        TokenSpan(
            token_ids_N=np.asarray(text["token_ids"], np.int32), num_scored=text["num_scored"]
        )
        for text in texts
    ]
    teacher = None if signal.kind == "nll" else signal.teacher
    found = measure_texts(engine, system, teacher, spans, mean=np.float64)
    quantities = sorted(found, key=lambda quantity: quantity != signal.kind)
    for number, text in enumerate(texts):
        values = {quantity: float(np.float32(found[quantity][number])) for quantity in quantities}
        yield {
            **scored(text["item"], values[signal.kind], "all"),
            "details": json.dumps(values),
            "messages": text["messages"],
            "num_tokens": text["num_scored"],
            "finish_reason": "measured",
        }


def _model(runtime: Mapping[str, Any], name: str) -> ServedConfig:
    known = {**runtime["models"], **runtime["systems"]}
    return _MODEL.validate_python(known[name])


def _local(config: EvaluateConfig, name: str) -> ServedConfig:
    model = {**config.models, **config.systems}[name]
    assert isinstance(model, ServedConfig)
    return model
