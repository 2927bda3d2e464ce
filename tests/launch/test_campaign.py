"""Campaigns on this machine, of verbs that need no model."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadistill.cli import main
from megadistill.config.cluster import ClusterConfig
from megadistill.config.work import WorkConfig
from megadistill.launch import staged_work
from megadistill.launch.campaign import Campaign, inherit
from megadistill.launch.commands import with_resources
from megadistill.launch.gang import Gang
from megadistill.launch.staged_work import read_states
from megadistill.launch.stages import add_job
from tests.launch.configs import settings
from tests.launch.test_submit import REFUSED, make_command

CRASHES = """
import json, os, sys
from pathlib import Path
words = sys.orig_argv
if words[-2:-1] == ["shard"]:
    here = Path(words[-1])
    command = json.loads((here / "shard.json").read_text())["arguments"]["words"]
    part, marker = Path(command[-1]).stem, here / "crashed"
    if part in ("part-2", "part-5") and not marker.exists():
        marker.touch()
        os._exit(3)
    if command[:2] == ["config", "check"]:
        with open(os.environ["MEGADISTILL_TEST_LEDGER"], "a") as ledger:
            ledger.write(part + "\\n")
"""


def make_crashing_site(directory: Path) -> dict[str, str]:
    """Variables under which `config check part-2.yaml` and part 5 crash once; the others count."""
    (directory / "site").mkdir()
    (directory / "site" / "sitecustomize.py").write_text(CRASHES)
    ledger = directory / "ledger"
    ledger.touch()
    return {"PYTHONPATH": str(directory / "site"), "MEGADISTILL_TEST_LEDGER": str(ledger)}


def write_campaign(directory: Path, **changed: Any) -> Path:
    """prepare -> eight parts, of which two crash once -> last."""
    for part in range(8):
        (directory / f"part-{part}.yaml").write_text(yaml.safe_dump(settings()))
    (directory / "run.yaml").write_text(yaml.safe_dump(settings()))
    stages = {
        "prepare": {"verb": "config", "args": ["schema"]},
        "parts": {
            "verb": "config",
            "args": ["check", f"{directory}/part-{{shard}}.yaml"],
            "array": 8,
            "concurrency": 2,
            "needs": ["prepare"],
        },
        "last": {
            "verb": "config",
            "args": ["check", str(directory / "run.yaml")],
            "inputs": [str(directory / "run.yaml")],
            "needs": ["parts"],
        },
    }
    tree = {
        "name": "small",
        "runs_dir": str(directory / "runs"),
        "cluster": {"exclusive": False, "cpus_per_node": 1, "time_minutes": 30},
        "stages": stages,
    }
    file = directory / "campaign.yaml"
    file.write_text(yaml.safe_dump(tree | changed))
    return file


def counts(directory: Path) -> dict[str, int]:
    lines = (directory / "ledger").read_text().split()
    return {line: lines.count(line) for line in lines}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in make_crashing_site(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path


def run_cli(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.timeout(300)
def test_a_campaign_runs_here_and_does_nothing_twice(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_campaign(folder)
    assert run_cli("config", "check", str(config)) == 0
    assert run_cli("campaign", str(config), "--local") == 0
    once = {f"part-{part}": 1 for part in range(8)} | {"run": 1}
    assert counts(folder) == once
    root = folder / "runs" / "small"
    assert root.stat().st_mode & 0o777 == 0o700
    assert run_cli("campaign", "resume", str(root), "--local") == 0
    assert counts(folder) == once
    capsys.readouterr()
    assert run_cli("status", str(root)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["prepare", "config", "done"],
        ["parts", "config", "done"],
        ["last", "config", "done"],
    ]
    assert "8 of 8" in lines[2]
    (folder / "run.yaml").write_text(yaml.safe_dump(settings(seed=1)))
    assert run_cli("campaign", str(config), "--local") == 0
    assert counts(folder) == once | {"run": 2}  # its input changed; what it needs did not


def test_a_failed_stage_keeps_back_only_what_needs_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {
        "bad": {"verb": "config", "args": ["check", str(folder / "gone.yaml")], "tries": 1},
        "after": {"verb": "config", "args": ["schema"], "needs": ["bad"]},
        "apart": {"verb": "config", "args": ["schema"]},
    }
    config = write_campaign(folder, stages=stages)
    assert run_cli("campaign", str(config), "--local") == 1
    printed = capsys.readouterr().out
    assert "after: not run, it needs bad" in printed
    assert "apart: done" in printed
    assert run_cli("campaign", "status", str(folder / "runs" / "small")) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    states = {row.split()[0]: row.split()[2:4] for row in rows if row[0].isalpha()}
    assert states["bad"][0] == "failed"
    assert states["after"] == ["not", "submitted"]
    assert states["apart"][0] == "done"


def test_a_stage_is_what_it_does_and_what_it_depends_on(folder: Path) -> None:
    def digests(**changed: Any) -> dict[str, str]:
        campaign = Campaign.load(write_campaign(folder, **changed))
        return {name: stage.digest for name, stage in campaign.plans.items()}

    before = digests()
    assert digests(cluster={"partition": "elsewhere"}) == before
    stages = yaml.safe_load((folder / "campaign.yaml").read_text())["stages"]
    stages["parts"] |= {"concurrency": 7, "tries": 1}
    assert digests(stages=stages) == before
    stages["prepare"]["args"] = ["schema", "--help"]
    after = digests(stages=stages)
    assert all(after[name] != before[name] for name in before)


def test_a_train_stage_is_its_run_whose_inputs_must_not_change(folder: Path) -> None:
    (folder / "train.yaml").write_text(
        yaml.safe_dump(settings(runs_dir=str(folder / "runs"), cluster={"nodes": 2}))
    )
    config = write_campaign(
        folder,
        cluster={"partition": "hopper", "nodes": 8, "time_minutes": 77},
        stages={
            "train": {
                "verb": "train",
                "config": str(folder / "train.yaml"),
                "args": ["steps=2"],
                "inputs": [str(folder / "run.yaml")],
                "resources": {"time_minutes": 33},
            }
        },
    )
    stage = Campaign.load(config).stages["train"]
    assert isinstance(stage, Gang)
    cluster = stage.config.cluster
    assert (cluster.nodes, cluster.partition, cluster.time_minutes) == (2, "hopper", 33)
    Campaign.load(config).begin()
    stage.begin()
    run = stage.run
    assert run.load_config().steps == 2
    assert not stage.is_done
    run.write_progress({"step": 2, "steps": 2, "done": True})
    assert stage.is_done
    (folder / "run.yaml").write_text("changed: true")
    changed = Campaign.load(config).stages["train"]
    assert isinstance(changed, Gang)
    assert not changed.is_done
    with pytest.raises(ValueError, match="holds a run that was made from other inputs"):
        changed.begin()
    shutil.rmtree(run.path)  # as the message says
    assert not changed.is_done
    changed.begin()
    assert run.config_file.exists()


def test_a_command_line_that_cannot_be_read_is_refused_before_anything_starts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {"odd": {"verb": "convert", "args": ["jax", "a", "b"]}}
    assert run_cli("campaign", str(write_campaign(folder, stages=stages)), "--local") == 2
    assert "megadistill: stages.odd: " in (printed := capsys.readouterr().err)
    assert "No such command 'jax'" in printed
    assert not (folder / "runs").exists()
    stages = {"odd": {"verb": "config", "args": ["schema"], "inputs": ["nowhere"]}}
    assert run_cli("campaign", str(write_campaign(folder, stages=stages)), "--local") == 2
    assert "stages.odd.inputs: found 'nowhere'" in capsys.readouterr().err


def test_a_stage_takes_the_sites_settings_and_its_own_resources() -> None:
    site = ClusterConfig(partition="a", account="me", nodes=9, modules=["cuda"])
    own = ClusterConfig(nodes=4, gpus_per_node=8)
    merged = inherit(own, site)
    assert (merged.nodes, merged.gpus_per_node, merged.partition) == (4, 8, "a")
    assert merged.modules == ["cuda"]
    work = WorkConfig(verb="eval", resources={"nodes": 1, "exclusive": False})  # type: ignore[arg-type]
    assert with_resources(merged, work).nodes == 1
    assert not with_resources(merged, work).exclusive


def test_placeholders_are_words_not_shell(folder: Path) -> None:
    stages = {"array": {"verb": "eval", "args": ["part={shard}/{shards}", "$(id) {x}"], "array": 2}}
    campaign = Campaign.load(write_campaign(folder, stages=stages))
    assert campaign.commands()["array"] == [
        ["eval", "part=0/2", "$(id) {x}"],
        ["eval", "part=1/2", "$(id) {x}"],
    ]
    assert os.environ["MEGADISTILL_TEST_LEDGER"]


def test_a_sweep_is_an_array_of_runs_with_names_of_their_own(folder: Path) -> None:
    stages = {
        "sweep": {
            "verb": "train",
            "config": str(folder / "run.yaml"),
            "args": ["name=lr-{shard}", "optimizer.lr={shard}e-6"],
            "array": 3,
        }
    }
    campaign = Campaign.load(write_campaign(folder, stages=stages))
    campaign.begin()
    commands = campaign.commands()["sweep"]
    (copy,) = {Path(words[1]) for words in commands}
    assert yaml.safe_load(copy.read_text())["student"] == settings()["student"]
    assert [words[2:] for words in commands] == [
        [f"name=lr-{shard}", f"optimizer.lr={shard}e-6"] for shard in range(3)
    ]
    assert [state.status for state in read_states(campaign.root)] == ["not submitted"]


def test_status_and_resume_work_from_any_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "sets").mkdir()
    (folder / "sets" / "run.yaml").write_text(yaml.safe_dump(settings()))
    stages = {
        "first": {"verb": "config", "args": ["check", "sets/run.yaml"], "inputs": ["sets/run.yaml"]}
    }
    write_campaign(folder, runs_dir="runs", stages=stages)
    monkeypatch.chdir(folder)
    assert run_cli("campaign", "campaign.yaml", "--local") == 0
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    capsys.readouterr()
    assert run_cli("campaign", "status", "../runs/small") == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        *("first", "config", "done", "1", "of", "1"),
    ]
    (folder / "sets" / "run.yaml").write_text(yaml.safe_dump(settings(seed=1)))
    assert run_cli("campaign", "resume", "../runs/small", "--local") == 0
    assert "first: done" in capsys.readouterr().out
    assert len(list((folder / "runs/small/stages/first/shards").iterdir())) == 2
    assert list((folder / "elsewhere").iterdir()) == []


def test_when_slurm_does_not_answer_the_files_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Campaign.load(write_campaign(folder)).begin()
    root = folder / "runs" / "small"
    add_job(root / "stages" / "parts", "12")
    make_command(folder, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(staged_work, "STATUS_PATIENCE_S", 0.0)
    assert run_cli("status", str(root)) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:4] for row in rows[1:4]] == [
        ["prepare", "config", "not", "submitted"],
        ["parts", "config", "submitted", "12"],
        ["last", "config", "not", "submitted"],
    ]
    assert "by the files alone, without the queue" in rows[4]
    assert "Unable to contact slurm controller" in rows[4]


def test_a_campaign_of_which_slurm_takes_no_job_leaves_no_directory(
    refusing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_campaign(refusing)
    for _ in range(2):
        assert run_cli("campaign", str(config)) == 2
        assert capsys.readouterr().err == f"megadistill: {REFUSED}\n"
        assert not (refusing / "runs" / "small").exists()
        (refusing / "runs").rmdir()
    Campaign.load(config).begin()
    add_job(refusing / "runs" / "small" / "stages" / "prepare", "12")
    assert run_cli("campaign", str(config)) == 2
    assert (refusing / "runs" / "small" / "campaign.yaml").exists()  # a job may work there


def test_a_directory_without_stages_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("campaign", "status", str(tmp_path)) == 2
    assert f"{tmp_path}: found no stages.json, expected the directory of a campaign" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("text", ["{nope", "[]", "{}", '{"stages": 3}'])
def test_stages_that_nobody_can_read_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "stages.json").write_text(text)
    for verb in ("status", "cancel"):
        assert run_cli("campaign", verb, str(tmp_path)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"megadistill: {tmp_path}/stages.json: found no stages in it")
