#!/usr/bin/env bash
# From a fresh clone to a recovered model, on a CPU: installs, prepares the small model, starts a
# real Slurm on this host, runs CaMOPD as a job, and shows what it did. Ended halfway, it goes on
# where it was.
#
#   MEGADISTILL_NO_SLURM=1 tools/quickstart.sh    the same run without Slurm
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
config=configs/embedded/camopd_medical.yaml
run=runs/camopd_medical_embedded
begun=$SECONDS

say() { printf '\n== %s  [%d:%02d]\n' "$*" $(((SECONDS - begun) / 60)) $(((SECONDS - begun) % 60)); }

say "1/5 Python packages"
tools/setup_env.sh
PATH=$root/.venv/bin:$PATH
export HF_HUB_OFFLINE=1

say "2/5 the small models: SmolLM2-135M-Instruct, and a medical version of it by a short SFT"
# Slurm's packages come meanwhile; what fails there is said in the next step.
if [[ -z ${MEGADISTILL_NO_SLURM:-} ]]; then slurm/local_cluster.sh install &>/dev/null & fi
model=$(megadistill prepare-model)
if [[ -d $(dirname "$model")/smollm2-135m-medical ]]; then
  echo "both are in $(dirname "$model")"
else
  rm -rf runs/sft_medical_embedded
  megadistill train configs/embedded/sft_medical.yaml
fi

say "3/5 Slurm on this host"
slurm=
wait
if [[ -z ${MEGADISTILL_NO_SLURM:-} ]] && slurm/local_cluster.sh start; then
  eval "$(slurm/local_cluster.sh env)"
  trap 'slurm/local_cluster.sh stop' EXIT
  slurm=yes
else
  echo "no Slurm here: the same run goes through 'megadistill train' on this machine"
fi

say "4/5 CaMOPD: the medical student recovers its general ability"
mkdir -p runs
if [[ $slurm ]]; then
  job=$(sbatch --parsable --output=runs/slurm-%j.out slurm/camopd_medical.sh "$config")
  echo "job $job: sbatch slurm/camopd_medical.sh $config"
else
  megadistill train "$config" >runs/train.out 2>&1 &
fi
megadistill status "$run" --watch

say "5/5 what it did"
megadistill report "$run"
echo "the recovered student: $root/$run/export"
say "done"
