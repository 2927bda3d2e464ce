"""The built distributions hold all that a user without a checkout needs: installed and used for real.

The wheel is installed into a new environment that sees the packages of this one, but not its megadistill.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import megadistill

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megadistill"
NOT_SOURCES = {"build", "data", "dist", "runs", "wandb"}


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; it sees nothing of the checkout."""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with an sdist and the wheel that was built from it, without network."""
    source = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        if path.is_dir() and path.name[0] != "." and path.name not in NOT_SOURCES:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / path.name, symlinks=True, ignore=ignored)
        elif path.is_file():
            shutil.copy(path, source)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    return source / "dist"


@pytest.fixture(scope="module")
def megadistill_of_wheel(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of an environment where the wheel is installed."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=built)
    (wheel,) = built.glob("*.whl")
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "-qq",
        "--python",
        venv / "bin/python",
        "install",
    ]
    run(*pip, "--no-deps", "--no-index", wheel, cwd=built)
    packages = sysconfig.get_path("purelib", vars={"base": str(venv)})
    # A path alone: what these packages run at start, e.g. an editable install, does not count.
    (Path(packages) / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return venv / "bin/megadistill"


def test_the_wheel_holds_every_file_of_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    expected = {
        str(Path(folder, file).relative_to(ROOT))
        for folder, _, files in os.walk(PACKAGE, followlinks=True)
        for file in files
        if "__pycache__" not in folder and file != "site.sh"
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_the_sdist_has_licence_tests_and_tools(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ("LICENSE", "CHANGELOG.md", "tests/test_wheel.py", "tools/setup_env.sh")
    assert {*wanted, "configs/camopd/medical.yaml", "slurm/raft.sh"} <= names


def test_the_installed_command_copies_checks_and_tries_a_recipe(
    megadistill_of_wheel: Path, tmp_path: Path
) -> None:
    command = megadistill_of_wheel
    python = command.with_name("python")
    where = run(python, "-c", "import megadistill; print(megadistill.__file__)", cwd=tmp_path)
    assert Path(where).is_relative_to(command.parents[1])
    assert run(command, "--version", cwd=tmp_path).split()[-1] == megadistill.__version__
    assert "configs/embedded/camopd_medical.yaml" in run(command, "recipes", "list", cwd=tmp_path)
    run(command, "recipes", "copy", "embedded/camopd_medical", ".", cwd=tmp_path)
    recipe = "configs/embedded/camopd_medical.yaml"
    assert run(command, "config", "check", recipe, cwd=tmp_path) == "1 of 1 files are valid\n"
    assert "--help" in run(command, "train", "--help", cwd=tmp_path)
    tried = run(command, "submit", "train", recipe, "--dry-run", cwd=tmp_path)
    assert "#SBATCH --job-name=camopd_medical_embedded" in tried
    assert f'exec "$@"\' node {python}' in tried
    assert "2 trainer rank(s), 2 engine(s), 1 node(s)" in tried


def test_the_installed_stand_in_for_sacct_can_be_run(
    megadistill_of_wheel: Path, tmp_path: Path
) -> None:
    print_it = "from megadistill.launch.slurm import NO_ACCOUNTING; print(NO_ACCOUNTING)"
    found = run(megadistill_of_wheel.with_name("python"), "-c", print_it, cwd=tmp_path).strip()
    assert Path(found).is_relative_to(megadistill_of_wheel.parents[1])
    assert os.access(Path(found, "sacct"), os.X_OK)
