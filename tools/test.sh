#!/usr/bin/env bash
# Installs what the tests need and runs them all: tools/test.sh [pytest arguments]
# Slurm's packages are installed by slurm/local_cluster.sh when root; without them and without the
# right to install them, the tests marked `slurm` are skipped and say so.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
tools/setup_env.sh --dev
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline
exec .venv/bin/pytest "$@"
