"""One preparation from its configuration to a JSONL file with its card: all of it, or nothing."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from megadistill.atomic import atomic_files
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
    try:
        with atomic_files(folder) as made:
            return _write(config, cleaner, made)
    except OSError as error:
        raise ValueError(f"{error.filename or folder}: {error.strerror}") from error


def _write(config: PrepareConfig, cleaner: Cleaner, folder: Path) -> str:
    """Every file of the preparation; returns its card for people."""
    names = {part: f"{name}.jsonl" for part, name in _names(config).items()}
    outputs = {name: folder / name for name in names.values()}
    with ExitStack() as stack:
        streams = {
            name: stack.enter_context(file.open("w", encoding="utf-8"))
            for name, file in outputs.items()
        }
        for example in _examples(config, cleaner):
            row = json.dumps(to_row(example, config), ensure_ascii=False)
            streams[names.get(example.part, f"{config.name}.jsonl")].write(row + "\n")
    settings = yaml.safe_load(dump(config))
    made = card.make_card(config, cleaner.counts, outputs, settings)
    text = card.describe(made)
    side = {"json": json.dumps(made, indent=1, ensure_ascii=False), "md": text}
    for suffix, content in side.items():
        (folder / f"{config.name}.card.{suffix}").write_text(content, encoding="utf-8")
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
