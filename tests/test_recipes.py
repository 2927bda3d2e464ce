"""Recipes are copied with what they need, and job scripts find their environment where they were copied to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill import recipes
from megadistill.cli.check import problem_of
from tests.test_cli import run_cli

ROOT = Path(__file__).parents[1]


def test_the_folder_holds_the_files_of_the_checkout() -> None:
    for name in ("configs/camopd/medical.yaml", "slurm/no_accounting/sacct"):
        assert (recipes.FOLDER / name).samefile(ROOT / name)


def test_every_recipe_says_what_it_is() -> None:
    found = recipes.recipes()
    assert {"configs/embedded/raft.yaml", "configs/clusters/_generic.yaml", "slurm/raft.sh"} <= {
        *found
    }
    assert all(len(sentence) > 10 for sentence in found.values())


def test_the_list_shows_whole_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("recipes", "list") == 0
    words = capsys.readouterr().out.split()
    assert [name for name in recipes.recipes() if name not in words] == []


def test_a_campaign_is_copied_with_all_that_its_stages_name_and_include(tmp_path: Path) -> None:
    made = recipes.copy("campaign/embedded_table", tmp_path)
    assert {str(path.relative_to(tmp_path / "configs")) for path in made} == {
        "campaign/embedded_table.yaml",
        "clusters/_local.yaml",
        "embedded/_data.yaml",
        "embedded/_medical.yaml",
        "embedded/_models.yaml",
        "embedded/camopd_medical.yaml",
        "embedded/mopd_medical.yaml",
        "embedded/sft_medical.yaml",
        "eval/embedded.yaml",
        "schemas/campaign.json",
        "schemas/eval.json",
        "schemas/run.json",
    }


@pytest.mark.parametrize("name", recipes.recipes())
def test_every_copied_configuration_is_valid_where_it_was_copied_to(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in recipes.copy(name, Path()):
        if path.suffix == ".yaml" and not path.name.startswith("_"):
            assert problem_of(str(path), with_models=False) is None


def test_an_edited_file_is_not_overwritten(tmp_path: Path) -> None:
    recipes.copy("mopd/medical", tmp_path)
    recipes.copy("mopd/medical", tmp_path)
    edited = tmp_path / "configs/camopd/medical.yaml"
    edited.write_text("name: mine\n")
    with pytest.raises(ValueError, match=r"camopd/medical\.yaml: found a file that differs"):
        recipes.copy("mopd/medical", tmp_path)
    assert edited.read_text() == "name: mine\n"


def test_an_unknown_recipe_is_named_with_those_like_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("recipes", "copy", "camopd/medicl", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "found 'camopd/medicl'" in said
    assert "configs/camopd/medical.yaml" in said


def test_a_recipe_outside_the_folder_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe: found"):
        recipes.copy("../../pyproject.toml", tmp_path)


def chosen(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What `slurm/env.sh` of `folder` takes for Python and configuration."""
    shell = (
        f'source {folder}/slurm/env.sh; choose configs/raft/llama32_3b.yaml; echo "$python $config"'
    )
    return subprocess.run(
        ["bash", "-c", shell], env=environment, capture_output=True, text=True, check=False
    )


def test_a_copied_job_script_takes_python_from_the_environment_that_is_active(
    tmp_path: Path,
) -> None:
    recipes.copy("slurm/raft", tmp_path)
    scripts = tmp_path / "active/bin"
    scripts.mkdir(parents=True)
    (scripts / "python").symlink_to(sys.executable)
    (scripts / "megadistill").touch(mode=0o755)
    environment = {"PATH": f"{scripts}:{os.environ['PATH']}"}
    found = chosen(tmp_path, environment)
    assert found.stdout.split() == [
        str(scripts / "python"),
        str(tmp_path / "configs/raft/llama32_3b.yaml"),
    ]
    own = tmp_path / ".venv/bin/python"
    own.parent.mkdir(parents=True)
    own.symlink_to(sys.executable)
    assert chosen(tmp_path, environment).stdout.startswith(f"{own} ")
    named = chosen(tmp_path, environment | {"MEGADISTILL_PYTHON": "/usr/bin/env"})
    assert named.stdout.startswith("/usr/bin/env ")


def test_a_copied_job_script_starts_the_nodes_with_its_own_configuration(tmp_path: Path) -> None:
    recipes.copy("slurm/camopd_medical", tmp_path / "mine")
    script = tmp_path / "mine/slurm/camopd_medical.sh"
    for name, text in (
        ("scontrol", f'echo "   Command={script} batch.size=8"'),  # as for a job that was submitted
        ("srun", 'echo "$@"'),
        ("megadistill", ""),
        ("python", ""),
    ):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/bash\n{text}\n")
        command.chmod(0o755)
    spooled = tmp_path / "spool" / "slurm_script"
    spooled.parent.mkdir()
    spooled.write_bytes(script.read_bytes())
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", spooled, "batch.size=8"],
        env=environment | {"SLURM_SUBMIT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    config = tmp_path / "mine/configs/camopd/medical.yaml"
    words = f"{tmp_path}/bin/python -u -m megadistill node {config} batch.size=8"
    assert done.stdout.strip().endswith(words)


def test_a_job_script_without_an_environment_says_what_to_do(tmp_path: Path) -> None:
    recipes.copy("slurm/raft", tmp_path)
    found = chosen(tmp_path, {"PATH": "/usr/bin:/bin"})
    assert found.returncode == 2
    assert f"found no {tmp_path}/.venv/bin/python and no megadistill on the PATH" in found.stderr
