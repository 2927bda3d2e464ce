#!/bin/bash
# RAFT, second stage: refined answers plus answer-conditioned distillation, 1 node x 8 GPUs.
#
#   sbatch slurm/raft.sh [CONFIG] [key=value ...]
#
# Without CONFIG it is configs/raft/llama32_3b.yaml. Slurm's options below fit that
# run and can be given to sbatch, too, where they win: sbatch --nodes=8 --partition=hopper slurm/...
# Five minutes before the time limit, or when it is preempted, the run saves and requeues itself;
# it goes on where it was until it is done. See slurm/env.sh for what a site can set.
#SBATCH --job-name=raft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
: "${SLURM_JOB_ID:?is not set; this is a job script: sbatch slurm/raft.sh [CONFIG] [key=value ...]}"

# Slurm runs a copy of this script from its spool directory; the checkout it came from is
# MEGADISTILL_PROJECT, or where the submitted file lies, or the directory of submission.
found=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/raft.sh.*|\1|p')
project=${MEGADISTILL_PROJECT:-${found%%$'\n'*}}
[[ -f $project/slurm/env.sh ]] || project=$SLURM_SUBMIT_DIR
[[ -f $project/slurm/env.sh ]] || echo "set MEGADISTILL_PROJECT to the checkout of megadistill" >&2
# shellcheck source=slurm/env.sh
source "$project/slurm/env.sh"
run_nodes configs/raft/llama32_3b.yaml "$@"
