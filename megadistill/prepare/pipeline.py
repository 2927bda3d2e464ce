"""One preparation from its configuration to a JSONL file with its card: all of it, or nothing."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml

from megadistill.config import PrepareConfig, dump, resolve_path
from megadistill.config.prepare import ConversationsConfig, MixtureConfig
from megadistill.convert.hf_files import resolve_model
from megadistill.data.pools import is_heldout, render_ids
from megadistill.evaluate.benchmarks import read_items
from megadistill.prepare import card, conversations, files, mixture
from megadistill.prepare.cleaning import Cleaner, Measure
from megadistill.prepare.overlap import BenchmarkItems, words_of
from megadistill.prepare.records import Example
from megadistill.refine.prompts import load_tokenizer
from megadistill.types import Message


def run_preparation(config: PrepareConfig, download_only: bool = False) -> str:
    """Make the files of a preparation; returns its card for people."""
    sources = list(card.sources_of(config).values())
    if download_only:
        places = files.download(config, sources)
        return "\n".join(str(place) for place in places) or "nothing of this is on the hub"
    for source in sources:
        files.files_of(config, source)
    cleaner = Cleaner(config, _benchmarks(config), _measure(config))
    folder = Path(resolve_path(config.output_dir))
    names = {mixture_part: f"{name}.jsonl" for mixture_part, name in _names(config).items()}
    with written_together(folder, names.values()) as writing:
        examples = _examples(config, cleaner)
        for example in examples:
            name = names.get(example.part, f"{config.name}.jsonl")
            writing.add(name, json.dumps(to_row(example, config), ensure_ascii=False))
        writing.flush()
        settings = yaml.safe_load(dump(config))
        made = card.make_card(config, cleaner.counts, writing.paths, settings)
        writing.side(f"{config.name}.card.json", json.dumps(made, indent=1, ensure_ascii=False))
        text = card.describe(made)
        writing.side(f"{config.name}.card.md", text)
    return text


def to_row(example: Example, config: PrepareConfig) -> dict[str, Any]:
    """What a run reads: the prompt in fields of its own, the answer in `answer` only."""
    row: dict[str, Any] = {"id": example.id}
    recipe = config.recipe
    if isinstance(recipe, MixtureConfig) and recipe.prompts == "question":
        if example.question is None:
            raise ValueError(
                "recipe.prompts: found question, but the rows are chats; set it to messages"
            )
        row |= {"question": example.question, "options": example.options}
    elif example.messages is not None:
        row["messages"] = list(example.messages)
    else:
        row["messages"] = [{"role": "user", "content": _as_text(example)}]
    split = "heldout" if is_heldout(example.id, config.heldout_fraction) else "train"
    return row | {"answer": example.answer, "part": example.part, "split": split}


class Writing:
    """Files that appear together at the end of a block."""

    def __init__(self, folder: Path, streams: Mapping[str, tuple[Path, IO[str]]]) -> None:
        self._folder = folder
        self._streams = dict(streams)

    @property
    def paths(self) -> dict[str, Path]:
        """Final name -> the file as it is called while it is written."""
        return {name: path for name, (path, _) in self._streams.items()}

    def add(self, name: str, line: str) -> None:
        self._streams[name][1].write(line + "\n")

    def side(self, name: str, text: str) -> None:
        """A further file, whole."""
        path = _temporary(self._folder, name)
        stream = path.open("w", encoding="utf-8")
        self._streams[name] = (path, stream)
        stream.write(text)

    def flush(self) -> None:
        for _, stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self) -> None:
        self.flush()
        for name, (path, stream) in self._streams.items():
            stream.close()
            path.replace(self._folder / name)

    def discard(self) -> None:
        for path, stream in self._streams.values():
            with ExitStack() as stack:  # closing may fail again where the disk is full
                stack.callback(path.unlink, missing_ok=True)
                stream.close()


@contextmanager
def written_together(folder: Path, names: Any) -> Iterator[Writing]:  # any iterable of names
    """Whole files, or none: a problem leaves what was there before.

    Raises `ValueError` when the disk is full or cannot be written.
    """
    writing = Writing(folder, {})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in dict.fromkeys(names):
            writing.side(name, "")
        yield writing
        writing.finish()
    except BaseException as error:
        with suppress(OSError):
            writing.discard()
        if isinstance(error, OSError):
            raise ValueError(f"{error.filename or folder}: {error.strerror}") from error
        raise


def _temporary(folder: Path, name: str) -> Path:
    return folder / f".{name}.{secrets.token_hex(4)}.tmp"


def _names(config: PrepareConfig) -> dict[str, str]:
    """Part -> name of its file, where parts have files of their own."""
    if isinstance(config.recipe, ConversationsConfig):
        assert config.sft_name is not None
        return {conversations.PROMPTS: config.name, conversations.SFT: config.sft_name}
    return {"": config.name}


def _examples(config: PrepareConfig, cleaner: Cleaner) -> Iterator[Example]:
    if isinstance(config.recipe, MixtureConfig):
        return mixture.mix(config, config.recipe, cleaner)
    return conversations.split(config, config.recipe, cleaner)


def _benchmarks(config: PrepareConfig) -> BenchmarkItems | None:
    chosen = config.contamination
    if chosen is None:
        return None
    items = BenchmarkItems(chosen.n, chosen.least, chosen.share)
    for name, path in chosen.benchmarks.items():
        items.add(name, (item.text for item in read_items(name, path)))
    return items


def _measure(config: PrepareConfig) -> Measure:
    if config.tokenizer is None:
        return _count_words
    tokenizer = load_tokenizer(resolve_model(config.tokenizer))
    return lambda chat: len(render_ids(chat, None, tokenizer))


def _count_words(chat: tuple[Message, ...]) -> int:
    return sum(len(words_of(turn["content"])) for turn in chat)


def _as_text(example: Example) -> str:
    options = example.options or {}
    return "\n".join(
        [example.question or "", *(f"{letter}. {text}" for letter, text in options.items())]
    )
