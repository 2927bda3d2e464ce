"""Launching runs: who runs what where, the process of each node, and submission to Slurm.

`submit` is the documented way in from Python; `run_here` and `run_under_slurm` are what
`megadistill train` and `megadistill node` call. Everything here imports without torch.
"""

from megadistill.launch.gang import Submitted, submit
from megadistill.launch.node import run_here, run_under_slurm

__all__ = ["Submitted", "run_here", "run_under_slurm", "submit"]
