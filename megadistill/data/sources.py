"""Sources of prompts: packaged sets, tasks, files, data sets of the hub. One record a prompt."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from megadistill.config.schema import (
    DatasetSource,
    FileSource,
    PackagedSource,
    PoolConfig,
    ReasoningGymSource,
    RowsSource,
)
from megadistill.data.files import Row, files_of, read_all
from megadistill.data.formats import to_record
from megadistill.data.records import Record

COMPOSITE = "composite"
"""The task of reasoning-gym that is others together, which it must be told."""


def read_pool(config: PoolConfig, name: str = "") -> Iterator[Record]:
    """All records of a pool as chats, source by source, in a fixed order.

    Raises `ValueError` naming the file and row of a bad record, or when two have the same id.
    """
    seen: set[str] = set()
    for source in config.sources:
        for record in _READERS[type(source)](source):
            if record.id in seen:
                raise ValueError(f"data.pools.{name}: two records have the id {record.id!r}")
            seen.add(record.id)
            is_medical = config.template == "medical"
            turns = record.medical_messages if is_medical else record.messages
            yield replace(record, prompt=turns, options=None)


def check_pool(config: PoolConfig, name: str) -> None:
    """Read all of a pool. Raises `ValueError` as `read_pool` does, and when it is empty."""
    if not deque(read_pool(config, name), maxlen=1):
        raise ValueError(f"data.pools.{name}: its sources have no record, expected some")


def _read_packaged(source: PackagedSource) -> Iterator[Record]:
    for row in read_all(files_of(source.location)):
        values = row.values
        if source.name == "general":
            yield Record(id=values["id"], prompt=values["prompt"])
            continue
        letter, options = values["answer"], values["options"]
        answer = f"{values['explanation']}\n\nFinal answer: {letter}. {options[letter]}"
        yield Record(id=values["id"], prompt=values["question"], options=options, answer=answer)


def _read_reasoning_gym(source: ReasoningGymSource) -> Iterator[Record]:
    import reasoning_gym  # noqa: PLC0415 - optional, and slow to import
    from reasoning_gym.factory import DATASETS  # noqa: PLC0415

    tasks = source.tasks or sorted(DATASETS.keys() - {COMPOSITE})
    unknown = [task for task in tasks if task not in DATASETS]
    if unknown:
        raise ValueError(f"tasks: found {unknown}, which reasoning-gym does not have")
    per_task = -(-source.size // len(tasks))
    for task in tasks:
        data = reasoning_gym.create_dataset(task, size=per_task, seed=source.seed)
        for index in range(per_task):
            entry = data[index]
            answer = entry["answer"]
            yield Record(
                id=f"{task}-{source.seed}-{index}",
                prompt=entry["question"],
                answer=None if answer is None else str(answer),
            )


def _read_files(source: FileSource) -> Iterator[Record]:
    return _to_records(source, read_all(files_of(source.location)))


def _read_dataset(source: DatasetSource) -> Iterator[Record]:
    name = "/".join(word for word in (source.path, source.subset, source.split) if word)
    rows = (
        Row(source=f"data set {name}", stem=name, number=number, content=values)
        for number, values in enumerate(_load_dataset(source), start=1)
    )
    return _to_records(source, rows)


def _to_records(source: RowsSource, rows: Iterable[Row]) -> Iterator[Record]:
    chosen = _chosen(source, rows) if source.where else rows
    return (to_record(row, source.row or source) for row in islice(chosen, source.limit))


def _chosen(source: RowsSource, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows that have these values. Raises `ValueError` with the values there are, if none has."""
    where, place = source.where, getattr(source, "path", "")
    found: dict[str, set[str]] = {field: set() for field in where}
    some = False
    for row in rows:
        values = {field: _as_text(row.values[field]) for field in where if field in row.values}
        if values == where:
            some = True
            yield row
        elif not some:
            for field, value in values.items():
                found[field].add(value)
    if not some:
        shown = "; ".join(
            f"{name}: {sorted(values)[:10] or 'none'}" for name, values in found.items()
        )
        raise ValueError(f"{place}: where: no row has {dict(where)}; found {shown}")


def _as_text(value: Any) -> str:  # whatever a field holds
    """As `where` names it: true, 3, the text itself."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _load_dataset(source: DatasetSource) -> Any:  # its rows; `datasets` has no types
    import datasets  # noqa: PLC0415 - slow to import, rarely needed

    (directory,) = files_of(source.location)
    is_saved = any((directory / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if not is_saved:
            return datasets.load_dataset(str(directory), source.subset, split=source.split)
        found = datasets.load_from_disk(str(directory))
    # RuntimeError: a data set that is a script, which is not run.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = f": {error.__cause__}" if error.__cause__ else ""
        raise ValueError(f"data set {source.path}: cannot be read: {error}{cause}") from error
    splits = found if isinstance(found, datasets.DatasetDict) else {"train": found}
    if source.subset is not None or source.split not in splits:
        raise ValueError(
            f"data set {source.path}: found subset {source.subset} and split {source.split!r}, "
            f"expected no subset and one of {sorted(splits)}"
        )
    return splits[source.split]


_READERS: Mapping[type, Callable[[Any], Iterator[Record]]] = {
    PackagedSource: _read_packaged,
    ReasoningGymSource: _read_reasoning_gym,
    FileSource: _read_files,
    DatasetSource: _read_dataset,
}
