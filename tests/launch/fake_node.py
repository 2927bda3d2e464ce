"""A node process whose roles are fakes: `python -m tests.launch.fake_node CONFIG [NODE OF]`.

With NODE and OF it plays one of several nodes on this machine, otherwise its place is Slurm's.
"""

import os
import sys
from pathlib import Path

from megadistill.launch.gang import leave_unless_done
from megadistill.launch.layout import Role
from megadistill.launch.node import run_node
from megadistill.launch.node_context import LOCALHOST, NodeContext, local_context, slurm_context
from megadistill.launch.supervisor import Timeouts
from megadistill.rundir import RunDir

QUICK = Timeouts(
    poll_s=0.05,
    heartbeat_s=0.2,
    silence_s=float(os.environ.get("FAKE_SILENCE_S", "60")),
    start_s=60,
    lock_s=2,
    settle_s=0.3,
    grace_s=0.5,
    drain_s=60,
    stop_s=60,
)


def fake_command(run: RunDir, role: Role) -> list[str]:
    script = Path(__file__).with_name("fake_role.py")
    return [sys.executable, "-S", str(script), str(run.path), role.name]


def fake_task(run_dir: Path) -> int:
    """Stands for `node_task` in jobs submitted through submitit."""
    context = slurm_context()
    return leave_unless_done(
        run_node(run_dir, context=context, command=fake_command, timeouts=QUICK)
    )


def place_of(arguments: list[str]) -> NodeContext:
    if not arguments:
        return slurm_context() if "SLURM_STEP_ID" in os.environ else local_context()
    node, num_nodes = int(arguments[0]), int(arguments[1])
    return NodeContext(
        node=node, num_nodes=num_nodes, hosts=(LOCALHOST,) * num_nodes, launch_id="test-launch"
    )


def main() -> int:
    context = place_of(sys.argv[2:])
    return run_node(sys.argv[1], context=context, command=fake_command, timeouts=QUICK)


if __name__ == "__main__":
    sys.exit(main())
