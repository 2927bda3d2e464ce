"""Where this process computes."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from megadistill.megatron.world import pick_device

pytestmark = pytest.mark.megatron


@pytest.mark.parametrize(("wanted", "gpus_per_node"), [("auto", 0), ("cpu", 0), ("cpu", 8)])
def test_a_cpu_run_is_one_on_request_or_without_gpus(wanted: str, gpus_per_node: int) -> None:
    assert pick_device(wanted, gpus_per_node).type == "cpu"


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_gpus_that_torch_does_not_see_are_an_error(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster run on a node without a driver would otherwise train on its CPU for days."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^device: .*gpus_per_node = 8.*torch.version.cuda is"):
        pick_device(wanted, 8)


LISTENER = """
import os, sys, torch
from datetime import timedelta
from megadistill.megatron.world import _rendezvous
rank = int(os.environ["RANK"])
store = _rendezvous(rank, 2, timedelta(seconds=60))
store.set(f"here-{rank}", "yes")
store.wait(["here-0", "here-1"])
port = f":{int(os.environ['MASTER_PORT']):04X}"
rows = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}")]
print([row[1] for row in rows if row[1].endswith(port) and row[3] == "0A"])
store.set(f"seen-{rank}", "yes")
store.wait(["seen-0", "seen-1"])
"""


def test_the_ranks_of_one_machine_meet_where_no_other_machine_can_listen_in() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LISTENER],
            env={**os.environ, **place, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0
        assert output == f"['0100007F:{port:04X}']\n"
