#!/usr/bin/env bash
# Makes or updates .venv with the pinned packages: tools/setup_env.sh [--gpu] [--dev]
# Quick when nothing changed. --gpu takes vLLM's CUDA build and Transformer Engine instead of the CPU's
# vLLM (Python 3.12; nvcc must be there), --dev adds what tests and checks need.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
torch=torch==2.13.0
transformer_engine='transformer-engine[pytorch]==2.17.1'
kind=cpu
pythons=(python3.11 python3.12 python3)
dev=
[[ ! -f $venv/.dev ]] || dev=yes
for option in "$@"; do
  case $option in
    --gpu) kind=gpu pythons=(python3.12) ;;
    --dev) dev=yes ;;
    *)
      sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2
      exit 2
      ;;
  esac
done
lists=("$root/requirements/$kind.txt")
[[ -z $dev ]] || lists+=("$root/requirements/dev.txt")

fail() {
  printf 'setup_env: %s\n' "$*" >&2
  exit 1
}

install_system() { # packages...: with apt-get when root, otherwise says what to ask for
  ((UID == 0)) || fail "missing system packages; ask an administrator for: apt-get install $*"
  command -v apt-get >/dev/null || fail "no apt-get here; install the equivalent of: $*"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

find_python() { # prints the first interpreter that can run this project
  local name
  for name in ${PYTHON:+"$PYTHON"} "${pythons[@]}"; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  fail "found none of ${pythons[*]}; install one, or set PYTHON to the path of Python 3.11 or 3.12"
}

if [[ ! -x $venv/bin/pip ]]; then
  python=$(find_python)
  "$python" -c 'import venv, ensurepip' 2>/dev/null || install_system python3-venv
  "$python" -m venv "$venv"
fi

# The lists and the path are what a finished installation depends on.
wanted=$(cat "${lists[@]}" "$root/pyproject.toml" | cat - <(echo "$torch $root") | sha256sum)
stamp=$venv/.installed
[[ -f $stamp && $(cat "$stamp") == "$wanted" ]] && exit 0

# reasoning-gym needs pycosat, which is only there as source.
headers=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
if ! command -v cc >/dev/null || [[ ! -f $headers/Python.h ]]; then
  install_system gcc libc6-dev python3-dev
fi

export PYTHONWARNINGS=ignore
pip=("$venv/bin/pip" -qq --disable-pip-version-check)
echo "installing Python packages into $venv (a few minutes the first time) ..."
"$venv/bin/python" -c "import torch" 2>/dev/null || "${pip[@]}" install --no-compile "$torch"
requirements=()
for list in "${lists[@]}"; do requirements+=(-r "$list"); done
"${pip[@]}" install --no-compile --no-deps "${requirements[@]}"
"${pip[@]}" install --no-deps --no-build-isolation -e "$root"
[[ $kind == cpu ]] || "${pip[@]}" install --no-build-isolation "$transformer_engine"

# Compiling every module takes a minute, so only what a run imports is: trainer and engine, side by
# side. It also shows that they can be imported.
unset PYTHONDONTWRITEBYTECODE
"$venv/bin/python" -c "import megadistill.train" &
trainer=$!
"$venv/bin/python" -c "import megadistill.rollout.vllm_engine"
wait $trainer
[[ -z $dev ]] || touch "$venv/.dev"
echo "$wanted" >"$stamp"
