"""Restricts where a configuration may have files written, on sites that want it.

`MEGADISTILL_ROOTS=/home/me:/scratch/me` in the environment (a site's, not the configuration's) refuses
run directories and exports elsewhere; unset, the file system's permissions alone decide.
"""

import os
from pathlib import Path

from megadistill.config import RunConfig, resolve_path

ROOTS = "MEGADISTILL_ROOTS"


def check_run_roots(config: RunConfig) -> None:
    """Raise `ValueError` when the run would write outside the allowed roots."""
    check_root("runs_dir", Path(config.runs_dir) / config.name)
    if config.checkpoint.export_dir is not None:
        check_root("checkpoint.export_dir", Path(resolve_path(config.checkpoint.export_dir)))


def check_root(key: str, path: Path) -> None:
    """Raise `ValueError` unless `path`, links followed, lies below an allowed root."""
    roots = [Path(root).resolve() for root in os.environ.get(ROOTS, "").split(os.pathsep) if root]
    if roots and not any(path.resolve().is_relative_to(root) for root in roots):
        allowed = ", ".join(str(root) for root in roots)
        raise ValueError(f"{key}: found {path}, expected a path below {allowed} ({ROOTS})")
