"""The doctor's judgement, on answers as Slurm and the nodes give them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megadistill.config.campaign import load_cluster
from megadistill.config.cluster import ClusterConfig
from megadistill.launch import doctor
from megadistill.launch.doctor import Finding, check_partition, check_probe, check_slurm
from tests.launch.test_submit import make_command

SETTINGS = {
    "SLURM_VERSION": "23.02.7",
    "JobRequeue": "1",
    "MaxArraySize": "1001",
    "MinJobAge": "300 sec",
    "AccountingStorageType": "(null)",
}


def verdicts(findings: Any) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in findings}


def test_a_good_slurm_passes_and_a_poor_one_is_told_why() -> None:
    assert set(verdicts(check_slurm(SETTINGS, [(100, 3)])).values()) == {"pass"}
    poor = SETTINGS | {"SLURM_VERSION": "19.05.1", "JobRequeue": "0", "MinJobAge": "10 sec"}
    found = {finding.check: finding for finding in check_slurm(poor, [(100, 3), (12, 7)])}
    assert found["Slurm version"].verdict == "fail"
    assert found["requeue"] == Finding(
        check="requeue",
        verdict="warn",
        found="JobRequeue=0",
        advice="jobs ask with --requeue; if yours still end when preempted, talk to the operators",
    )
    assert found["job age"].verdict == "warn"
    jobs = found["submitted jobs"]
    assert (jobs.verdict, jobs.found) == (
        "warn",
        "MaxSubmitJobs=100, 3 now, MaxSubmitJobs=12, 7 now",
    )


@pytest.mark.parametrize(
    ("gpu_type", "gpus", "verdict"),
    [(None, 8, "pass"), ("h100", 8, "pass"), ("a100", 8, "fail"), (None, 16, "fail")],
)
def test_gpus_are_read_from_the_gres(
    gpu_type: str | None,
    gpus: int,
    verdict: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_command(tmp_path, "sinfo", 'echo "main up gpu:h100:8(S:0-1)"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cluster = ClusterConfig(gpus_per_node=gpus, gpu_type=gpu_type)
    assert verdicts(check_partition(cluster)) == {"partition": "pass", "GPUs": verdict}


def test_what_a_node_found_is_judged() -> None:
    good = {
        "host": "n1",
        "canary_s": 0.2,
        "skew_s": -0.1,
        "signal_s": 0.5,
        "gpus": ["NVIDIA H100, 81559 MiB, 0"] * 8,
        "all_reduce": json.dumps({"backend": "nccl", "gb_per_s": 45.0}),
    }
    cluster = ClusterConfig(nodes=2, gpus_per_node=8)
    assert set(verdicts(check_probe(good, cluster, in_job=True)).values()) == {"pass"}
    bad = good | {
        "canary_s": None,
        "skew_s": 60.0,
        "signal_s": None,
        "gpus": ["NVIDIA H100, 81559 MiB, 0"] * 7 + ["NVIDIA H100, 81559 MiB, 3"],
        "all_reduce": json.dumps({"backend": "nccl", "gb_per_s": 1.0}),
    }
    found = {finding.check: finding for finding in check_probe(bad, cluster, in_job=True)}
    assert {check: finding.verdict for check, finding in found.items()} == {
        "n1: shared files": "fail",
        "n1: clock": "warn",
        "n1: signals": "fail",
        "n1: GPUs": "fail",
        "all-reduce": "warn",
    }
    assert found["n1: GPUs"].found == "8 x NVIDIA H100, 1 with memory errors"
    assert all(finding.advice for finding in found.values())
    dead = good | {"all_reduce": "connection refused"}
    assert verdicts(check_probe(dead, cluster, in_job=True))["n1: all-reduce"] == "fail"


def test_a_site_profile_wins_over_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("cluster: {nodes: 4, partition: a}\nsteps: 1\n")
    (tmp_path / "site.yaml").write_text("cluster: {partition: b}\n")
    cluster = load_cluster(str(tmp_path / "run.yaml"), str(tmp_path / "site.yaml"))
    assert (cluster.nodes, cluster.partition) == (4, "b")
    assert load_cluster(None, None) == ClusterConfig()


@pytest.mark.multi
def test_without_slurm_this_machine_is_examined_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    findings = list(doctor.examine(ClusterConfig(), tmp_path))
    found = verdicts(findings)
    assert found["Slurm"] == "warn"
    assert found["torch"] == found["127.0.0.1: shared files"] == found["127.0.0.1: clock"] == "pass"
    assert "fail" not in {finding.verdict for finding in findings if "127" in finding.check}


@pytest.mark.slurm
@pytest.mark.multi
def test_on_a_real_slurm_a_tiny_job_of_two_nodes_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megadistill.cli import main
    from megadistill.launch import slurm
    from tests.e2e.local_slurm import ROOT, local_cluster

    site = tmp_path / "site.yaml"
    site.write_text("cluster: {nodes: 2, exclusive: false, cpus_per_node: 1}\n")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(slurm, "WAIT_POLL_S", 0.5)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setenv("COLUMNS", "600")  # no line of the table is broken in two
    with local_cluster() as cluster:
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        arguments = ["doctor", "--cluster", str(site), "--shared", str(tmp_path)]
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        printed = capsys.readouterr().out
        assert ended.value.code == 0, printed
        rows = {
            line[6:].split("  ")[0].strip(): line.split()[0] for line in printed.splitlines()[1:]
        }
        for check in ("node1: shared files", "node2: signals", "all-reduce", "tiny job", "requeue"):
            assert rows.get(check) == "pass", printed
        site.write_text("cluster: {partition: nowhere}\n")
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 1
        assert "invalid partition specified: nowhere" in capsys.readouterr().out
