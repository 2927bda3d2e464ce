"""What a site profile becomes: words and exports, never text that a shell would interpret."""

import shlex
from pathlib import Path

import pytest
import yaml

from megadistill.config import ConfigError, read_tree
from megadistill.config.cluster import ClusterConfig
from megadistill.launch import sbatch_options, slurm
from tests.launch.configs import make_config

PROFILES = sorted((Path(__file__).parents[2] / "configs" / "clusters").glob("*.yaml"))


def job_script(directory: Path, cluster: ClusterConfig) -> str:
    parameters = sbatch_options.sbatch_parameters("run", cluster, directory)
    python = shlex.join(sbatch_options.python_words(cluster))
    executor = slurm.DryGangExecutor(directory, python=python)
    executor.update_parameters(**parameters)
    return executor.script()


def profile(name: str) -> ClusterConfig:
    tree = read_tree(next(path for path in PROFILES if path.stem == name))
    return make_config(cluster=tree["cluster"] | {"gpus_per_node": 8}).cluster


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_that_ships_is_valid(path: Path, tmp_path: Path) -> None:
    cluster = make_config(**yaml.safe_load(yaml.safe_dump(read_tree(path)))).cluster
    assert "srun" in job_script(tmp_path, cluster)


def test_gpus_modules_scratch_and_variables(tmp_path: Path) -> None:
    lines = job_script(tmp_path, profile("_generic")).splitlines()
    for line in (
        "#SBATCH --gpus-per-node=h100:8",
        "module load cuda",
        "export TMPDIR=/local/megadistill-$SLURM_JOB_ID",
        "export NCCL_SOCKET_IFNAME=ib0",
        "export UCX_NET_DEVICES=mlx5_0:1",
    ):
        assert line in lines
    assert not any("container" in line for line in lines)


def test_with_pyxis_srun_starts_the_container(tmp_path: Path) -> None:
    lines = job_script(tmp_path, profile("_pyxis")).splitlines()
    words = shlex.split(next(line for line in lines if line.startswith("srun ")))
    assert "--container-image=/shared/images/megadistill.sqsh" in words
    assert "--container-mounts=/shared:/shared,/local:/local" in words
    assert f"--container-workdir={Path.cwd()}" in words
    assert "--no-container-mount-home" in words
    assert words[words.index("node") + 1 : words.index("-u")] == ["/usr/bin/python3"]
    assert any(line.startswith("trap requeue_if_asked") for line in lines)


def test_apptainer_runs_python_in_the_image(tmp_path: Path) -> None:
    lines = job_script(tmp_path, profile("_apptainer")).splitlines()
    words = shlex.split(next(line for line in lines if line.startswith("srun ")))
    assert words[words.index("node") + 1 : words.index("-u")] == [
        *("apptainer", "exec", "--nv", f"--pwd={Path.cwd()}"),
        *("--bind=/shared", "--bind=/etc/slurm:/etc/slurm:ro"),
        *("--no-home", "/shared/images/megadistill.sif", "python3"),
    ]


def test_no_value_is_interpreted_by_the_shell(tmp_path: Path) -> None:
    evil = "$(touch /tmp/x); `id` 'a' \"b\""
    cluster = ClusterConfig(
        partition=evil,
        modules=[evil],
        environment={"NAME": evil},
        scratch=evil,
        container={"kind": "apptainer", "image": evil, "mounts": [evil], "options": [evil]},  # type: ignore[arg-type]
    )
    script = job_script(tmp_path, cluster)
    assert script.count(shlex.quote(evil)) == 6  # partition, module, variable, scratch, container
    words = shlex.split(next(line for line in script.splitlines() if line.startswith("srun ")))
    assert words.count(evil) == 2
    assert f"--bind={evil}" in words
    with pytest.raises(ConfigError, match=r"cluster\.environment"):
        make_config(cluster={"environment": {"A; id": "x"}})
