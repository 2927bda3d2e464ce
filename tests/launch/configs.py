"""Configurations for launch tests: everything a run needs, nothing that is ever loaded."""

from pathlib import Path
from typing import Any

import yaml

from megadistill.config import RunConfig, parse


def settings(**changed: Any) -> dict[str, Any]:
    """A camopd run; keyword arguments replace whole sections."""
    branch = {"pool": "all", "teacher": "one"}
    tree: dict[str, Any] = {
        "name": "launch",
        "steps": 3,
        "student": {"path": "student"},
        "teachers": {"one": {"path": "teacher"}},
        "algorithm": {"kind": "camopd", "general": branch, "domain": branch},
        "data": {"pools": {"all": {"sources": [{"kind": "packaged", "name": "general"}]}}},
        "rollout": {},
    }
    return {**tree, **changed}


def make_config(**changed: Any) -> RunConfig:
    return parse(RunConfig, settings(**changed))


def write_config(directory: Path, **changed: Any) -> Path:
    """A configuration file whose run directory is `directory/runs/launch`."""
    file = directory / "config.yaml"
    file.write_text(yaml.safe_dump(settings(runs_dir=str(directory / "runs"), **changed)))
    return file
