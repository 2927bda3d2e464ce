"""One preparation from its configuration to a JSONL file with its card: all of it, or nothing."""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from megadistill.atomic import atomic_files
from megadistill.config import PrepareConfig, dump, resolve_path
from megadistill.config.prepare import MixtureConfig
from megadistill.config.rows import Message
from megadistill.data.pools import is_heldout
from megadistill.data.records import Record
from megadistill.data.tokenizer import chat_ids, load_tokenizer
from megadistill.evaluate.benchmarks import read_items
from megadistill.prepare import card, conversations, files, mixture
from megadistill.prepare.cleaning import Cleaner, Measure
from megadistill.prepare.overlap import BenchmarkItems
from megadistill.refine.answer_measures import words_of

log = logging.getLogger(__name__)
NO_MIRROR = (
    "data sets of the hub lie in the Hugging Face cache, which `--download-only` fills; for files of "
    "the mirror set `files` to their paths, and no `hub`"
)


def run_preparation(config: PrepareConfig, download_only: bool = False) -> str:
    """Make the files of a preparation; returns its card for people."""
    if config.mirror is not None:
        log.warning("mirror: found %r, which is not read any more; %s", config.mirror, NO_MIRROR)
    found = [files.files_of(source, download=True) for source in config.recipe.sources.values()]
    if download_only:
        return "\n".join(str(file) for some in found for file in some)
    cleaner = Cleaner(config, _benchmarks(config), _measure(config))
    folder = Path(resolve_path(config.output_dir))
    try:
        with atomic_files(folder) as made:
            return _write(config, cleaner, made)
    except OSError as error:
        raise ValueError(f"{error.filename or folder}: {error.strerror}") from error


def _write(config: PrepareConfig, cleaner: Cleaner, folder: Path) -> str:
    """Every file of the preparation; returns its card for people."""
    names = [name for name in (config.name, config.sft_name) if name is not None]
    outputs = {f"{name}.jsonl": folder / f"{name}.jsonl" for name in names}
    with ExitStack() as stack:
        streams = [
            stack.enter_context(file.open("w", encoding="utf-8")) for file in outputs.values()
        ]
        for record in _records(config, cleaner):
            row = json.dumps(to_row(record, config), ensure_ascii=False)
            streams[len(names) - 1 if record.part == conversations.SFT else 0].write(row + "\n")
    settings = yaml.safe_load(dump(config))
    made = card.make_card(config, cleaner, outputs, settings)
    text = card.describe(made)
    side = {"json": json.dumps(made, indent=1, ensure_ascii=False), "md": text}
    for suffix, content in side.items():
        (folder / f"{config.name}.card.{suffix}").write_text(content, encoding="utf-8")
    return text


def to_row(record: Record, config: PrepareConfig) -> dict[str, Any]:
    """What a run reads: the prompt in fields of its own, the answer in `answer` only."""
    row: dict[str, Any] = {"id": record.id}
    recipe = config.recipe
    if isinstance(recipe, MixtureConfig) and recipe.prompts == "question":
        if not isinstance(record.prompt, str):
            raise ValueError(
                "recipe.prompts: found question, but the rows are chats; set it to messages"
            )
        row |= {"question": record.prompt, "options": record.options}
    else:
        row["messages"] = list(record.messages)
    split = "heldout" if is_heldout(record.id, config.heldout_fraction) else "train"
    return row | {"answer": record.answer or None, "part": record.part, "split": split}


def _records(config: PrepareConfig, cleaner: Cleaner) -> Iterator[Record]:
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
    tokenizer = load_tokenizer(config.tokenizer)
    return lambda chat: len(chat_ids(chat, tokenizer))


def _count_words(chat: tuple[Message, ...]) -> int:
    return sum(len(words_of(turn["content"])) for turn in chat)
