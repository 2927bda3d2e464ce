"""The cheap signals of an evaluation: what their shards are asked, and how their columns are called."""

import importlib.resources
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megadistill.config import EvaluateConfig, resolve_path
from megadistill.config.evaluate import SignalConfig
from megadistill.config.refine import ServedConfig
from megadistill.config.schema import (
    DataConfig,
    DatasetSource,
    FileSource,
    PackagedSource,
    PoolConfig,
)
from megadistill.data.files import resolve_dataset
from megadistill.launch.shards import fingerprint
from megadistill.refine.pipeline import identity

_DATA: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)
_SIGNAL: TypeAdapter[SignalConfig] = TypeAdapter(SignalConfig)
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
        "files": [fingerprint(file) for file in source_files(pool)],
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


def source_files(pool: PoolConfig) -> Iterator[Path]:
    """The files and directories that a pool is read from."""
    for source in pool.sources:
        if isinstance(source, FileSource):
            yield Path(resolve_path(source.path))
        elif isinstance(source, DatasetSource):
            yield resolve_dataset(source.path, source.revision)
        elif isinstance(source, PackagedSource):
            sets = Path(str(importlib.resources.files("megadistill.data") / "sets"))
            yield from sorted(sets.glob(f"{source.name}_*.jsonl"))


def _local(config: EvaluateConfig, name: str) -> ServedConfig:
    model = {**config.models, **config.systems}[name]
    assert isinstance(model, ServedConfig)
    return model
