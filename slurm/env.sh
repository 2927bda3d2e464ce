#!/bin/bash
# What the job scripts share; they source it once they have found it. A site adapts a job by its
# environment, or by a file slurm/site.sh (modules, NCCL variables, the variables below):
#
#   MEGADISTILL_PROJECT       the checkout, or the folder that `megadistill recipes copy` filled, where
#                             the search of the job script is not enough
#   MEGADISTILL_PYTHON        python of an environment with megadistill (.venv/bin/python of that folder,
#                             else the one whose `megadistill` is on the PATH)
#   MEGADISTILL_SRUN_OPTIONS  more words for srun, e.g. --container-image=/images/train.sqsh
#   SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS, ...   sbatch itself reads these

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -f $project/slurm/site.sh ]]; then
  # shellcheck source=/dev/null
  source "$project/slurm/site.sh"
fi

choose() { # default config, then the job script's arguments: [CONFIG] [key=value ...]
  python=${MEGADISTILL_PYTHON:-$project/.venv/bin/python}
  if [[ -z ${MEGADISTILL_PYTHON:-} && ! -x $python ]] && found=$(command -v megadistill); then
    python=$(dirname "$(realpath "$found")")/python  # it may be a link, e.g. of pipx
  fi
  config=$project/$1 overrides=("${@:2}")
  if (($# > 1)) && [[ $2 != *=* ]]; then
    config=$2 overrides=("${@:3}")
    [[ -e $config || ! -e $project/$config ]] || config=$project/$config
  fi
  if [[ ! -e $config ]]; then
    echo "$0: found no $config, expected a configuration or a run directory" >&2
    exit 2
  fi
  if ! command -v "$python" >/dev/null; then
    echo "$0: found no $python and no megadistill on the PATH; make the one with tools/setup_env.sh," \
      "activate an environment that has the other, or set MEGADISTILL_PYTHON" >&2
    exit 2
  fi
}

run_eval() { # as choose
  choose "$@"
  exec "$python" -u -m megadistill eval "$config" ${overrides[@]+"${overrides[@]}"}
}

run_nodes() { # as choose
  local options=()
  choose "$@"
  read -r -a options <<<"${MEGADISTILL_SRUN_OPTIONS:-}"
  MEGADISTILL_LAUNCH=$(date +%s%N) # tells this start of the job from every other
  export MEGADISTILL_LAUNCH
  # A warning that comes while Python still loads must not kill it: USR1 starts out ignored.
  local start=(bash -c 'trap "" USR1; exec "$@"' node)
  # Of `sbatch ... : ...` the first component trains and the second hosts the engines.
  if ((${SLURM_HET_SIZE:-1} > 1)); then
    options+=(--het-group=0-$((SLURM_HET_SIZE - 1)))
    unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE # they are the first component's
  fi
  # One node process a node. It starts the trainers and engines itself, so it is bound to no core;
  # when one node fails or ends, the others do not go on without it.
  # A site's SBATCH_EXPORT=NONE or a user's SRUN_* must not keep the environment from the tasks.
  local command=(srun --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=120 --cpu-bind=none
    --input=none --export=ALL ${options[@]+"${options[@]}"} "${start[@]}" "$python" -u
    -m megadistill node "$config" ${overrides[@]+"${overrides[@]}"})
  [[ ${MEGADISTILL_SRUN_OPTIONS:-} == *--container* ]] || exec "${command[@]}"
  run_in_container "${command[@]}"
}

run_in_container() { # command...: a container mostly has no scontrol, so what needs it is done here
  local code=0
  MEGADISTILL_HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
  MEGADISTILL_REQUEUE=$SLURM_SUBMIT_DIR/.requeue-$SLURM_JOB_ID
  export MEGADISTILL_HOSTS MEGADISTILL_REQUEUE
  trap '' TERM # Slurm's, which the node processes heed
  "$@" || code=$?
  if [[ -e $MEGADISTILL_REQUEUE ]]; then
    rm "$MEGADISTILL_REQUEUE"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}
