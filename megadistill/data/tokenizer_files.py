"""The files of a model's tokenizer: what can be said of them without the library that reads them."""

import json
from collections.abc import Mapping
from pathlib import Path


def check_ids(directory: Path, vocabulary: Mapping[str, int]) -> None:
    """Raise `ValueError` when a token has an id beyond the rows of the model's embedding."""
    file = directory / "config.json"
    size = json.loads(file.read_text(encoding="utf-8")).get("vocab_size") if file.exists() else None
    if size is None:
        return
    if beyond := sorted(token for token, number in vocabulary.items() if number >= size):
        raise ValueError(
            f"{directory}: its tokenizer has {len(beyond)} ids beyond the {size} rows of the "
            f"embedding (vocab_size), e.g. of {beyond[0]!r}; resize the embedding or remove the tokens"
        )
