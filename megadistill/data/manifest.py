"""What a run reads its prompts from and with, as marks that tell whether it is still the same."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megadistill.config.schema import DataConfig
from megadistill.data.files import files_of
from megadistill.data.pools import PromptPool

NUM_BLOCKS, BLOCK_BYTES = 64, 2**16
"""Of each file so many blocks are read for its mark, evenly spread."""
FILE = " file "
"""In the keys of files, which say why prompts have changed, where they have."""


def manifest(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, pools: Mapping[str, PromptPool]
) -> dict[str, str]:
    """Key -> mark: of the tokenizer, its chat template, each file, and each pool as it was read."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    marks = {
        "the tokenizer's vocabulary": hash_of([json.dumps(vocabulary).encode()]),
        "the chat template": hash_of([str(tokenizer.chat_template).encode()]),
    }
    for name, pool in sorted(pools.items()):
        for index, source in enumerate(config.pools[name].sources):
            key = f"data.pools.{name}.sources[{index}]{FILE}"
            for file in files_of(source.location):
                marks |= {f"{key}{path}": mark for path, mark in _marks(file)}
        prompts = (
            json.dumps([prompt.id, prompt.token_ids, prompt.answer]).encode()
            for prompt in (*pool.train, *pool.heldout)
        )
        marks[f"data.pools.{name}"] = (
            f"{len(pool.train)} prompts to train on, {len(pool.heldout)} held out, "
            f"{pool.num_dropped} too long, {pool.num_unusable} unusable, {hash_of(prompts)}"
        )
    return marks


def file_bytes(file: Path) -> Iterator[bytes]:
    """Its name, its size and blocks spread over it: what a mark is made of."""
    size = file.stat().st_size
    yield f"{file.name} {size}".encode()
    with file.open("rb") as stream:
        spread = range(0, size, max(BLOCK_BYTES, size // NUM_BLOCKS))
        for place in (*spread, max(0, size - BLOCK_BYTES)):
            stream.seek(place)
            yield stream.read(BLOCK_BYTES)


def _marks(file: Path) -> Iterator[tuple[Path, str]]:
    """Of a file, or of those of a directory."""
    for found in sorted(file.rglob("*")) if file.is_dir() else [file]:
        if found.is_file():
            yield found, f"{found.stat().st_size} bytes, {hash_of(file_bytes(found))}"


def hash_of(parts: Iterable[bytes]) -> str:
    """The beginning of SHA-256."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
