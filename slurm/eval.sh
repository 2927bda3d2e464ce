#!/bin/bash
# An evaluation: answers as one Slurm array, scores as another, then a small job for the table.
#
#   sbatch slurm/eval.sh [CONFIG] [key=value ...]
#
# Without CONFIG it is configs/eval/medical.yaml. This job only submits those and ends, its log says how
# to follow them; what they ask for is the configuration's `cluster`. Submitted again it submits what is
# not done. See slurm/env.sh for what a site can set.
#SBATCH --job-name=eval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
: "${SLURM_JOB_ID:?is not set; this is a job script: sbatch slurm/eval.sh [CONFIG] [key=value ...]}"

# Slurm runs a copy of this script from its spool directory; the checkout it came from is
# MEGADISTILL_PROJECT, or where the submitted file lies, or the directory of submission.
found=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/eval.sh.*|\1|p')
project=${MEGADISTILL_PROJECT:-${found%%$'\n'*}}
[[ -f $project/slurm/env.sh ]] || project=$SLURM_SUBMIT_DIR
[[ -f $project/slurm/env.sh ]] || echo "set MEGADISTILL_PROJECT to the checkout of megadistill" >&2
# shellcheck source=slurm/env.sh
source "$project/slurm/env.sh"
run_eval configs/eval/medical.yaml "$@"
