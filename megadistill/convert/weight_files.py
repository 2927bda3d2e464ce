"""The weight files of a Hugging Face model: which there are, and whether they are whole."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megadistill.resolve import check_content

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def weight_map(directory: Path) -> dict[str, str]:
    """Tensor name to file name, from the index or from the single weights file.

    Raises `ValueError` when there is neither, when there are both and they differ, or when the index
    names a file that is missing.
    """
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if not index.exists():
        if not single.exists():
            raise ValueError(
                f"{directory}: found neither {INDEX_FILE} nor {SINGLE_FILE}; "
                "only safetensors weights are read"
            )
        return dict.fromkeys(open_weights(single).keys(), SINGLE_FILE)
    files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    if strange := sorted({file for file in files.values() if Path(file).name != file}):
        raise ValueError(f"{index}: found {strange}, expected plain file names")
    missing = sorted({file for file in files.values() if not (directory / file).exists()})
    if missing:
        raise ValueError(f"{index}: names missing files {missing}; download the model again")
    if single.exists() and SINGLE_FILE not in files.values():
        raise ValueError(f"{index}: does not name {single}; delete the one that is not the model")
    return files


def open_weights(file: Path, framework: str = "np") -> Any:  # a `safe_open`, which has no types
    """A safetensors file, for reading. Raises `ValueError` when it is cut, or is none."""
    try:
        return safe_open(file, framework=framework)
    except SafetensorError as error:
        check_content(file, "weights")
        raise ValueError(
            f"{file}: found no whole safetensors file ({error}); download it again"
        ) from error


def check_weights(directory: Path) -> None:
    """Raise `ValueError` unless every weight file is there and whole, by its header and length."""
    for name in sorted(set(weight_map(directory).values())):
        open_weights(directory / name)
