"""Semantic filtering, Eq. (2)-(3): how near a rewrite is to its answer for a sentence encoder.

Shape legend: N texts, D embedding.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from megadistill.config.refine import FilterConfig
from megadistill.launch.shards import Runtime, Upstream
from megadistill.refine.blocks import KEY, Blocks, RowNamer, read_blocks
from megadistill.refine.records import PartArguments
from megadistill.resolve import resolve

Vectors = npt.NDArray[np.float64]

ROUNDING = 1e-6
"""The encoder computes in fp32: a similarity this little below tau is tau."""
COLUMNS = {"index": "int64", "similarity": "float64"}
"""`similarity` is null where there is no rewrite."""


class MeasureArguments(PartArguments):
    """A part of the records, its rewrites, and the encoder that compares them."""

    settings: FilterConfig
    """But for `tau`, which decides later: another one measures nothing again."""
    encoder: str
    """Hash of the files."""
    rewrites: Upstream
    batch_size: Runtime[int]
    threads: Runtime[int]


class Encoder(Protocol):
    """A sentence encoder, seen from here."""

    window: int
    """Tokens it reads at once, without those it adds itself."""

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Begin and end in `text` of each of its tokens."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Embeddings [N, D], of any length."""


def passes(similarity: float, tau: float) -> bool:
    """Eq. (3): the boundary itself passes."""
    return similarity >= tau - ROUNDING


def embed(texts: Sequence[str], encoder: Encoder) -> Vectors:
    """Unit vectors [N, D]; of a long text the mean of its chunks' unit vectors, scaled to one."""
    chunked = [chunks(text, encoder.offsets(text), encoder.window) for text in texts]
    vectors_CD = _unit(encoder.encode([chunk for parts in chunked for chunk in parts]))
    ends = np.cumsum([len(parts) for parts in chunked])
    means = [part.mean(axis=0) for part in np.split(vectors_CD, ends[:-1])]
    return _unit(np.stack(means))


def chunks(text: str, offsets: Sequence[tuple[int, int]], window: int) -> list[str]:
    """`text` cut into pieces of at most `window` tokens, between words where there are any."""
    if len(offsets) <= window:
        return [text]
    pieces: list[str] = []
    first = 0
    while first < len(offsets):
        after = min(first + window, len(offsets))
        if after < len(offsets):
            after = _word_start(text, offsets, first, after)
        pieces.append(text[offsets[first][0] : offsets[after - 1][1]])
        first = after
    return pieces


def _word_start(text: str, offsets: Sequence[tuple[int, int]], first: int, after: int) -> int:
    """The last token at or before `after` that follows a blank; `after` if none does."""
    for token in range(after, first, -1):
        begin = offsets[token][0]
        if begin > 0 and text[begin - 1].isspace():
            return token
    return after


def _unit(vectors_ND: Vectors) -> Vectors:
    norms = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    units: Vectors = vectors_ND / np.maximum(norms, np.finfo(np.float64).tiny)
    return units


def similarities(first: Sequence[str], second: Sequence[str], encoder: Encoder) -> list[float]:
    """Cosine of each pair of texts, Eq. (2)."""
    if not first:
        return []
    both = embed([*first, *second], encoder)
    cosines = np.einsum("nd,nd->n", both[: len(first)], both[len(first) :])
    return [float(value) for value in np.clip(cosines, -1.0, 1.0)]


class SentenceEncoder:
    """A model of sentence-transformers."""

    def __init__(self, config: FilterConfig, *, gpu: bool, threads: int = 1) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import torch  # noqa: PLC0415 - slow to import
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415

        if not gpu:
            torch.set_num_threads(threads)
        path = str(resolve("encoder", config.encoder, key="filter.encoder"))
        self._model = SentenceTransformer(path, device="cuda" if gpu else "cpu")
        # `Any`: the kind of tokenizer depends on the model.
        self._tokenizer = cast(Any, self._model.tokenizer)
        self._batch_size = config.batch_size
        longest = self._model.max_seq_length or self._tokenizer.model_max_length
        added = self._tokenizer.num_special_tokens_to_add()
        self.window = min(config.window or longest, longest) - added

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Begin and end in `text` of each of its tokens."""
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        offsets: list[tuple[int, int]] = encoded["offset_mapping"]
        return offsets

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Embeddings [N, D]."""
        vectors = self._model.encode(
            list(texts), batch_size=self._batch_size, show_progress_bar=False
        )
        return np.asarray(vectors, dtype=np.float64)


def measure(directory: Path, arguments: MeasureArguments) -> None:
    """The shard: similarities of its part's rewrites."""
    records = arguments.read()
    rewrites = read_blocks(arguments.rewrites.outputs)
    assert [row["index"] for row in rewrites] == [record.index for record in records]
    key_of = RowNamer(arguments)
    labels = [
        {"index": record.index, KEY: key_of(record.raw_answer, row["rewrite"])}
        for record, row in zip(records, rewrites, strict=True)
    ]
    blocks = Blocks(directory, COLUMNS, labels, size=arguments.block)
    missing = blocks.missing()
    if not missing:
        return
    settings = arguments.settings.model_copy(update={"batch_size": arguments.batch_size})
    encoder = SentenceEncoder(settings, gpu=arguments.gpu, threads=arguments.threads)
    for start in range(missing[0], len(records), blocks.size):
        positions = [p for p in missing if start <= p < start + blocks.size]
        usable = [p for p in positions if rewrites[p]["rewrite"] is not None]
        found = similarities(
            [records[p].raw_answer for p in usable],
            [rewrites[p]["rewrite"] for p in usable],
            encoder,
        )
        by_position = dict(zip(usable, found, strict=True))
        for position in positions:
            blocks.add(position, {"similarity": by_position.get(position)})
