#!/usr/bin/env bash
# Makes or updates .venv with the pinned packages: tools/setup_env.sh [--gpu] [--dev]
# Quick when nothing changed. --gpu takes vLLM's CUDA build and Transformer Engine instead of the CPU's
# vLLM (Python 3.12; nvcc must be there), --dev adds what tests and checks need.
#
#   PYTHON                    interpreter for a new .venv   (the newest of Python 3.11 to 3.13 that is here)
#   MEGADISTILL_TORCH_INDEX   index of torch wheels, e.g. of its CPU build;
#                             what the ordinary index has is the CUDA build, 3 GB larger   (pip's own)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
transformer_engine='transformer-engine[pytorch]==2.17.1'
kind=cpu
pythons=(python3.13 python3.12 python3.11 python3)
dev=
[[ ! -f $venv/.dev ]] || dev=yes
for option in "$@"; do
  case $option in
    --gpu) kind=gpu pythons=(python3.12) ;;
    --dev) dev=yes ;;
    *)
      sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
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

install_system() { # packages...: with apt-get when root, otherwise 1
  ((UID == 0)) && command -v apt-get >/dev/null || return 1
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

find_python() { # prints the first interpreter that can run this project
  local name
  for name in ${PYTHON:+"$PYTHON"} "${pythons[@]}"; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  return 1
}

make_venv() { # by an interpreter that is here, or by uv, which brings one
  local python package=
  if python=$(find_python); then
    package=$("$python" -c 'import sys; print("python3.%d-venv" % sys.version_info.minor)')
    if "$python" -c 'import venv, ensurepip' 2>/dev/null || install_system "$package"; then
      "$python" -m venv "$venv"
      return
    fi
  fi
  if command -v uv >/dev/null; then
    uv venv --quiet --seed --python="${python:-${pythons[0]#python}}" "$venv"
  else
    fail "found ${python:-none of ${pythons[*]}}${python:+ without its venv}; install" \
      "${package:-Python 3.11, 3.12 or 3.13 and set PYTHON to its path}, or have uv make the environment," \
      "then this again: pip install uv && uv venv --seed --python=${python:-3.13} $venv"
  fi
}

[[ -x $venv/bin/pip ]] || make_venv

# The lists, the path and torch's origin are what a finished installation depends on.
torch=("$root/requirements/torch.txt" ${MEGADISTILL_TORCH_INDEX:+--index-url="$MEGADISTILL_TORCH_INDEX"})
wanted=$(cat "${torch[0]}" "${lists[@]}" "$root/pyproject.toml" | cat - <(echo "$root") | sha256sum)
stamp=$venv/.installed
[[ -f $stamp && $(cat "$stamp") == "$wanted" ]] && exit 0

export PYTHONWARNINGS=ignore
pip=("$venv/bin/pip" -qq --disable-pip-version-check)
temporary=$(mktemp -d)
trap 'rm -r "$temporary"' EXIT
cat "${lists[@]}" >"$temporary/list.txt"

# reasoning-gym needs pycosat, which is only there as source.
headers=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
if ! command -v cc >/dev/null || [[ ! -f $headers/Python.h ]]; then
  package=$("$venv/bin/python" -c 'import sys; print("python3.%d-dev" % sys.version_info.minor)')
  if ! install_system gcc libc6-dev "$package"; then
    echo "setup_env: reasoning-gym's tasks are left out, for want of a C compiler or Python.h; the embedded" \
      "runs do without. An administrator can: apt-get install gcc libc6-dev $package"
    sed -i '/^pycosat==/d; /^reasoning-gym==/d' "$temporary/list.txt"
    wanted=incomplete
  fi
fi
command -v bwrap >/dev/null || install_system bubblewrap || echo "setup_env: no bubblewrap, which eval wants for programs that models wrote"

echo "installing Python packages into $venv (a few minutes the first time) ..."
"$venv/bin/python" -c "import torch" 2>/dev/null ||
  "${pip[@]}" install --no-compile -r "${torch[0]}" "${torch[@]:1}"
"${pip[@]}" install --no-compile --no-deps -r "$temporary/list.txt"
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
