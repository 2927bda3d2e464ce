#!/bin/bash
# An evaluation: answers as one Slurm array, scores as another, then the table.
#
#   sbatch slurm/eval.sh [CONFIG] [key=value ...]
#
# Without CONFIG it is configs/eval/medical.yaml. This job only submits the arrays, waits for them and
# writes the table; what they ask for is the configuration's `cluster`. Submitted again it runs what is
# not done. See slurm/env.sh for what a site can set.
#SBATCH --job-name=eval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

name=eval.sh
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "$name is a job script: sbatch slurm/$name [CONFIG] [key=value ...]" >&2
  exit 2
fi

# Slurm runs a copy of this script from its spool directory; find the checkout it came from.
command=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
for project in "${MEGADISTILL_PROJECT:-}" "${command%%/slurm/"$name"*}" "$SLURM_SUBMIT_DIR"; do
  if [[ -n $project && -f $project/slurm/env.sh ]]; then
    # shellcheck source=slurm/env.sh
    source "$project/slurm/env.sh"
    config=configs/eval/medical.yaml
    if (($#)) && [[ $1 != *=* ]]; then
      config=$1
      shift
    fi
    [[ -e $config || ! -e $project/$config ]] || config=$project/$config
    exec "${MEGADISTILL_PYTHON:-$project/.venv/bin/python}" -u -m megadistill eval "$config" "$@"
  fi
done
echo "$name: found no checkout with slurm/env.sh; set MEGADISTILL_PROJECT to it" >&2
exit 2
