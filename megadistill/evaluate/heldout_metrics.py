"""Held-out metrics of an evaluation, the configuration's `signals`: their shards and their columns.

The texts are a teacher's own answers or the pool's, written once and the same for every system; the
training engine scores them as it does during a run.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

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
from megadistill.inference.model_argument import ModelArgument
from megadistill.inference.requests import BatchRequest, SamplingParams
from megadistill.launch.shards import Runtime, ShardArguments, Upstream, fingerprint
from megadistill.megatron.frozen import FrozenModels
from megadistill.refine.blocks import Row, read_rows_of, write_rows
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


class TextsArguments(ShardArguments):
    """The texts of a signal; two signals on the same texts share them."""

    signal: SignalConfig
    data: DataConfig
    """With the signal's pool alone."""
    files: tuple[str, ...]
    """Hashes of what the pool is read from."""
    writer: ModelArgument
    seed: int
    gpu: Runtime[bool]


class MeasureArguments(ShardArguments):
    """The signals of one system."""

    system: ModelArgument
    signals: dict[str, SignalConfig]
    writers: dict[str, ModelArgument]
    """By signal: the teacher where there is one."""
    texts: dict[str, Upstream]
    gpu: Runtime[bool]


def writer_of(config: EvaluateConfig, signal: SignalConfig) -> str:
    """Whose tokenizer writes the texts: the teacher's, or, for the pool's own answers, the first's."""
    return signal.teacher or next(iter(measured_systems(config)))


def measured_systems(config: EvaluateConfig) -> list[str]:
    """The systems that are directories, not endpoints."""
    return [name for name, model in config.systems.items() if isinstance(model, ServedConfig)]


def text_arguments(
    config: EvaluateConfig, name: str, models: Mapping[str, ModelArgument], *, gpu: bool
) -> TextsArguments:
    """Of the shard that writes the texts of a signal."""
    assert config.data is not None
    signal = config.signals[name]
    kind = {} if signal.teacher is None else {"kind": "forward_kl"}
    pool = config.data.pools[signal.pool]
    chosen = {"pools": {signal.pool: pool}, "date": config.data.date or config.date}
    return TextsArguments(
        signal=signal.model_copy(update=kind),
        data=config.data.model_copy(update=chosen),
        files=tuple(fingerprint(f) for source in pool.sources for f in files_of(source.location)),
        writer=models[writer_of(config, signal)],
        seed=config.seed,
        gpu=gpu,
    )


def measure_arguments(
    config: EvaluateConfig,
    system: str,
    texts: Mapping[str, Upstream],
    models: Mapping[str, ModelArgument],
    *,
    gpu: bool,
) -> MeasureArguments:
    """Of the shard that measures a system; `texts` by signal."""
    return MeasureArguments(
        system=models[system],
        signals=dict(config.signals),
        writers={name: models[writer_of(config, s)] for name, s in config.signals.items()},
        texts=dict(texts),
        gpu=gpu,
    )


def title_of(signal: SignalConfig) -> str:
    """The head of its column."""
    match signal.kind:
        case "forward_kl":
            return f"KL({signal.teacher} ‖ system), {signal.pool}"
        case "reverse_kl":
            return f"KL(system ‖ {signal.teacher}), {signal.pool}"
    whose = f"{signal.teacher}'s answers" if signal.teacher else "reference answers"
    return f"NLL of {whose}, {signal.pool}"


def write_texts(directory: Path, arguments: TextsArguments) -> None:
    """The shard: the texts of one signal."""
    signal, data = arguments.signal, arguments.data
    model = arguments.writer.served
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
        seeds = [seed_for(arguments.seed, 0, prompt.id) for prompt in prompts]
        context = data.max_prompt_tokens + signal.max_tokens
        texts = sample(model, prompts, seeds, (context, signal.max_tokens), gpu=arguments.gpu)
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


def measure(directory: Path, arguments: MeasureArguments) -> None:
    """The shard: every signal of one system, a file each."""
    system = arguments.system.name
    models = {system: arguments.system.served}
    tokenizer = load_tokenizer(models[system].path)
    for name, writer in arguments.writers.items():
        if load_tokenizer(writer.served.path).get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"signals: {system} and {writer.name} have different tokenizers, expected the same"
            )
        if arguments.signals[name].kind != "nll":
            models.setdefault(writer.name, writer.served)
    engine = FrozenModels(
        {name: (resolve("model", model.path), model.precision) for name, model in models.items()},
        gpu=arguments.gpu,
        threads=models[system].engine.threads,
    )
    for name, signal in arguments.signals.items():
        (folder,) = arguments.texts[name].outputs
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
