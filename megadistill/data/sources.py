"""Where prompts come from: packaged sets, tasks, files, data sets of the hub. One record a prompt."""

import importlib.resources
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megadistill.config import resolve_path
from megadistill.config.schema import (
    DatasetSource,
    FileSource,
    PackagedSource,
    PoolConfig,
    ReasoningGymSource,
    RowsSource,
)
from megadistill.data.files import SUFFIXES, read_rows, resolve_dataset
from megadistill.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A prompt before any tokenizer has seen it."""

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None


MEDICAL_SYSTEM = (
    "You are a careful medical reasoning assistant. You give educational information, say what is "
    "uncertain, and recommend professional care when it is needed."
)
"""System message of CaMOPD's medical prompt (Fig. 7), in our words."""

MEDICAL_CHOICE = "Please reason step by step and give the final answer choice at the end."
MEDICAL_OPEN = (
    "Please reason step by step and answer clearly. Do not present the answer as a substitute for "
    "professional medical advice."
)


def read_pool(config: PoolConfig) -> Iterator[Record]:
    """All records of a pool, source by source, in a fixed order.

    Raises `ValueError` naming the file and row of a bad record.
    """
    for source in config.sources:
        for row in _READERS[type(source)](source):
            yield _to_record(row, config.template)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """What every source can be reduced to."""

    id: str
    prompt: str | tuple[Message, ...]
    answer: str | None = None
    options: Mapping[str, str] | None = None


def _to_record(row: _Row, template: str) -> Record:
    if not isinstance(row.prompt, str):
        return Record(id=row.id, messages=row.prompt, answer=row.answer)
    if template == "medical":
        return Record(
            id=row.id, messages=medical_messages(row.prompt, row.options), answer=row.answer
        )
    lines = [row.prompt, *(f"{letter}. {text}" for letter, text in (row.options or {}).items())]
    messages = ({"role": "user", "content": "\n".join(lines)},)
    return Record(id=row.id, messages=messages, answer=row.answer)


def medical_messages(question: str, options: Mapping[str, str] | None) -> tuple[Message, ...]:
    """CaMOPD's medical prompt: with options a choice question, without them the open variant."""
    lines = [question, *(f"{letter}. {text}" for letter, text in (options or {}).items())]
    lines.append(MEDICAL_CHOICE if options else MEDICAL_OPEN)
    return (
        {"role": "system", "content": MEDICAL_SYSTEM},
        {"role": "user", "content": "\n".join(lines)},
    )


def _read_packaged(source: PackagedSource) -> Iterator[_Row]:
    folder = importlib.resources.files("megadistill.data") / "sets"
    if source.name == "general":
        for line in (folder / "general_prompts.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            yield _Row(id=row["id"], prompt=row["prompt"])
        return
    for line in (folder / "medical_questions.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        letter = row["answer"]
        answer = f"{row['explanation']}\n\nFinal answer: {letter}. {row['options'][letter]}"
        yield _Row(id=row["id"], prompt=row["question"], answer=answer, options=row["options"])


def _read_reasoning_gym(source: ReasoningGymSource) -> Iterator[_Row]:
    import reasoning_gym  # noqa: PLC0415 - optional, and slow to import
    from reasoning_gym.factory import DATASETS  # noqa: PLC0415

    tasks = source.tasks or sorted(DATASETS)
    unknown = [task for task in tasks if task not in DATASETS]
    if unknown:
        raise ValueError(f"tasks: found {unknown}, which reasoning-gym does not have")
    per_task = -(-source.size // len(tasks))
    for task in tasks:
        data = reasoning_gym.create_dataset(task, size=per_task, seed=source.seed)
        for index in range(per_task):
            entry = data[index]
            answer = entry["answer"]
            yield _Row(
                id=f"{task}-{source.seed}-{index}",
                prompt=entry["question"],
                answer=None if answer is None else str(answer),
            )


def _read_file(source: FileSource) -> Iterator[_Row]:
    path = Path(resolve_path(source.path))
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; set the `path` of this source to one of {', '.join(SUFFIXES)}"
        )
    for row in islice(read_rows(path), source.limit):
        yield _to_row(source, row.values, row.place, f"{path.stem}-{row.number}")


def _read_dataset(source: DatasetSource) -> Iterator[_Row]:
    rows = _load_dataset(source)
    name = "/".join(word for word in (source.path, source.subset, source.split) if word)
    for number, values in enumerate(islice(rows, source.limit), start=1):
        yield _to_row(source, values, f"data set {name}: row {number}", f"{name}-{number}")


def _load_dataset(source: DatasetSource) -> Any:  # its rows; `datasets` has no types
    import datasets  # noqa: PLC0415 - slow to import, rarely needed

    directory = resolve_dataset(source.path, source.revision)
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


def _to_row(source: RowsSource, values: Mapping[str, Any], place: str, default_id: str) -> _Row:
    """Raises `ValueError` beginning with the row's place."""
    for name in (source.prompt, source.answer, source.options):
        if name is not None and name not in values:
            raise ValueError(f"{place} has no field {name!r}; it has {sorted(values)}")
    prompt, answer = _prompt(values[source.prompt], f"{place}: {source.prompt!r}")
    if source.answer is not None:
        answer = values[source.answer]
    options = values[source.options] if source.options else None
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"{place}: {source.options!r} is not a mapping from letter to text")
    name = values.get("id")
    return _Row(
        id=default_id if name is None else str(name),
        prompt=prompt,
        # An empty cell of a CSV file is no answer.
        answer=None if answer is None or not str(answer).strip() else str(answer),
        # Parquet gives every row the letters of all rows.
        options=options and {key: text for key, text in options.items() if text is not None},
    )


def _prompt(prompt: Any, place: str) -> tuple[str | tuple[Message, ...], str | None]:
    """The user's text, or chat turns without anything but role and content, and the turn that answers.

    What the assistant says last is an answer and never part of the prompt.
    """
    if isinstance(prompt, str) and prompt.strip():
        return prompt, None
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{place} is empty, or neither text nor chat messages")
    if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in prompt):
        raise ValueError(f"{place} has a turn without `role` and `content`")
    if not all(isinstance(turn["content"], str) for turn in prompt):
        raise ValueError(f"{place} has a turn whose `content` is no text")
    turns = tuple({"role": turn["role"], "content": turn["content"]} for turn in prompt)
    is_answered = turns[-1]["role"] == "assistant"
    asked = turns[:-1] if is_answered else turns
    if not any(turn["role"] == "user" for turn in asked):
        raise ValueError(f"{place} has no turn of the user to answer")
    return asked, turns[-1]["content"] if is_answered else None


_READERS: Mapping[type, Callable[[Any], Iterator[_Row]]] = {
    PackagedSource: _read_packaged,
    ReasoningGymSource: _read_reasoning_gym,
    FileSource: _read_file,
    DatasetSource: _read_dataset,
}
