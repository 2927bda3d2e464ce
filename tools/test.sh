#!/usr/bin/env bash
# Installs what the tests need and runs them all: tools/test.sh [pytest arguments]
# Slurm's packages are installed when root; without them the tests marked `slurm` are skipped.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
tools/setup_env.sh --dev
slurm/local_cluster.sh install || echo "the tests marked slurm are skipped"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline
# Many tests wait for Slurm, so two files at a time keep two cores busy.
exec .venv/bin/pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
