"""The pinned sets are whole for every Python, and set-up says what is missing and what brings it."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
NO_NETWORK = ("dns error", "error sending request", "Connect", "timed out", "Failed to fetch")


def requirements(lines: list[str], python: str) -> list[Requirement]:
    """Those that hold for a Python on x86-64."""
    environment = {"python_version": python, "platform_machine": "x86_64", "extra": ""}
    found = [Requirement(line.partition("  #")[0]) for line in lines if line[:1] != "#"]
    return [one for one in found if one.marker is None or one.marker.evaluate(environment)]


def pins(python: str, *names: str) -> dict[str, str]:
    """Package -> version of the sets `names`."""
    lines = [line for name in names for line in (ROOT / f"requirements/{name}.txt").open()]
    return {
        canonicalize_name(one.name): next(iter(one.specifier)).version
        for one in requirements([line.strip() for line in lines], python)
    }


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_dependency_has_a_pin_that_it_allows(python: str) -> None:
    wanted = {
        ("torch", "cpu"): [*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["eval"]],
        ("torch", "cpu", "dev"): [*EXTRAS["dev"], *EXTRAS["docs"]],
    }
    if python == "3.12":
        wanted["torch", "gpu"] = [*PROJECT["dependencies"], *EXTRAS["gpu"]]
    for names, lines in wanted.items():
        found = pins(python, *names)
        for one in requirements(lines, python):
            if one.name != "transformer-engine":  # built by set-up, against the torch that is there
                assert found.get(canonicalize_name(one.name), "nothing") in one.specifier, str(one)


@pytest.mark.parametrize(("python", "megatron"), [("3.11", "0.16.1"), ("3.13", "0.19.2")])
def test_megatron_is_the_newest_that_a_python_has(python: str, megatron: str) -> None:
    assert pins(python, "cpu")["megatron-core"] == megatron


def test_the_sets_are_what_the_resolver_makes_of_the_dependencies() -> None:
    pytest.importorskip("uv")
    command = [sys.executable, str(ROOT / "tools" / "lock.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if any(word in done.stderr for word in NO_NETWORK):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stdout + done.stderr


def set_up(root: Path, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`tools/setup_env.sh` in a folder of its own, where PATH has some commands only."""
    for name in ("tools", "requirements"):
        shutil.copytree(ROOT / name, root / name, dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", root)
    for name in ("bash", "env", "dirname", "cat", "sed"):
        found = shutil.which(name)
        assert found is not None
        path.mkdir(exist_ok=True)
        (path / name).symlink_to(found)
    command = [root / "tools" / "setup_env.sh"]
    variables = {"PATH": str(path), "HOME": str(root)} | environment
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def write_command(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


def test_without_a_python_set_up_names_the_command_that_makes_one(tmp_path: Path) -> None:
    done = set_up(tmp_path, tmp_path / "bin")
    assert done.returncode == 1
    assert "install Python 3.11, 3.12 or 3.13 and set PYTHON" in done.stderr
    assert f"uv venv --seed --python=3.13 {tmp_path}/.venv" in done.stderr


def test_without_a_python_uv_makes_the_environment_where_it_is_there(tmp_path: Path) -> None:
    write_command(tmp_path / "bin/uv", 'echo "$@"; exit 7')
    done = set_up(tmp_path, tmp_path / "bin")
    assert done.returncode == 7
    assert done.stdout == f"venv --quiet --seed --python=3.13 {tmp_path}/.venv\n"


def test_a_python_without_venv_is_said_to_lack_it(tmp_path: Path) -> None:
    lacks = 'case "$2" in *ensurepip*) exit 1 ;; *print*) echo python3.12-venv ;; esac'
    write_command(tmp_path / "bin/python3.12", lacks)
    done = set_up(tmp_path, tmp_path / "bin")
    assert (
        f"found {tmp_path}/bin/python3.12 without its venv; install python3.12-venv" in done.stderr
    )


def test_set_up_takes_the_newest_python_that_works(tmp_path: Path) -> None:
    write_command(tmp_path / "bin/python3.13", "exit 127")  # as a shim without its interpreter
    is_venv = '[[ $1 != -m ]] || { echo "3.12 $*"; exit 7; }'
    write_command(tmp_path / "bin/python3.12", is_venv)
    write_command(tmp_path / "bin/python3.11", 'echo "3.11 was asked"')
    done = set_up(tmp_path, tmp_path / "bin")
    assert done.stdout == f"3.12 -m venv {tmp_path}/.venv\n"
    assert done.returncode == 7


def test_torch_comes_from_the_index_that_the_user_names(tmp_path: Path) -> None:
    """Everything that would install is recorded: which index each is asked for."""
    venv = tmp_path / ".venv/bin"
    venv.mkdir(parents=True)
    log = tmp_path / "log"
    write_command(venv / "pip", f'echo "$@" >>{log}')
    write_command(venv / "python", '[[ $2 != "import torch" ]]')
    path = tmp_path / "bin"
    for name in ("sha256sum", "mktemp", "rm", "cc", "touch"):
        write_command(path / name, f'exec /usr/bin/{name} "$@"' if name != "cc" else "exit 0")
    done = set_up(tmp_path, path, MEGADISTILL_TORCH_INDEX="https://index.example/cpu")
    assert done.returncode == 0, done.stderr
    assert (
        log.read_text()
        .splitlines()[0]
        .endswith(f"-r {tmp_path}/requirements/torch.txt --index-url=https://index.example/cpu")
    )
    assert "--index-url" not in "".join(log.read_text().splitlines()[1:])
