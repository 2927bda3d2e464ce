"""Fixtures of launch tests."""

from pathlib import Path

import pytest

from tests.launch.test_submit import REFUSED, make_command


@pytest.fixture
def refusing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory, and a Slurm that takes no job."""
    commands = tmp_path / "bin"
    commands.mkdir()
    make_command(commands, "sbatch", f"echo '{REFUSED}' >&2; exit 1")
    for name in ("srun", "sacct", "squeue"):
        make_command(commands, name, "exit 0")
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    return tmp_path
