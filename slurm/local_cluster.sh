#!/bin/bash
# A real Slurm on this host: munge, slurmctld and several slurmd, each slurmd in its own UTS, mount
# and PID namespace, everything on 127.0.0.1. For trying and testing; needs no system service.
#
#   slurm/local_cluster.sh install    install the packages, when root
#   slurm/local_cluster.sh start      start what is not running, after `install`
#   eval "$(slurm/local_cluster.sh env)"    point sbatch, squeue, ... of this shell at it
#   slurm/local_cluster.sh status     daemons, nodes and jobs; exit code 3 when it is not running
#   slurm/local_cluster.sh kill N     power failure of node N: slurmd and all its jobs die at once
#   slurm/local_cluster.sh node N     boot node N again
#   slurm/local_cluster.sh stop       cancel its jobs and end what this script started
#
# Root, or a plain user where user namespaces are allowed. Settings, from the environment:
#   MEGADISTILL_SLURM        state directory   (${TMPDIR:-/tmp}/megadistill-slurm-$UID)
#   MEGADISTILL_SLURM_PORT   first of 400 ports (17817)
#   MEGADISTILL_SLURM_NODES  nodes (4)      MEGADISTILL_SLURM_CPUS, _GPUS  on each node (8, 8 fake)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
state=${MEGADISTILL_SLURM:-${TMPDIR:-/tmp}/megadistill-slurm-$UID}
port=${MEGADISTILL_SLURM_PORT:-17817}
nodes=${MEGADISTILL_SLURM_NODES:-4}
cpus=${MEGADISTILL_SLURM_CPUS:-8}
gpus=${MEGADISTILL_SLURM_GPUS:-8}
packages=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge)
namespaces=(--uts --mount --propagation private --pid --fork --kill-child --mount-proc)
((UID == 0)) || namespaces=(--user --map-current-user --keep-caps "${namespaces[@]}")
export SLURM_CONF=$state/slurm.conf PATH=$PATH:/usr/sbin:/sbin
unset SLURM_JOB_ID SLURM_CLUSTERS

say() { printf 'local_cluster: %s\n' "$*" >&2; }
fail() {
  say "$*"
  exit 1
}

# --- processes: known by pid and start time, so that a reused pid is never taken for ours ---------

start_time() { # of process $1, empty when it is gone or only waits to be reaped
  local stat
  read -r stat 2>/dev/null <"/proc/$1/stat" || return 0
  local fields
  read -r -a fields <<<"${stat##*) }"
  [[ ${fields[0]} == Z ]] || echo "${fields[19]}"
}

remember() { # name pid
  echo "$2 $(start_time "$2")" >"$state/run/$1"
}

pid_of() { # prints the pid of process `name` if it runs
  local pid started
  read -r pid started 2>/dev/null <"$state/run/$1" || return 0
  if [[ -n $started && $(start_time "$pid") == "$started" ]]; then echo "$pid"; fi
}

spawn() { # name command...: in the background, in a session of its own
  local name=$1
  shift
  setsid "$@" >"$state/log/$name.out" 2>&1 </dev/null 9>&- &
  remember "$name" $!
}

until_true() { # seconds command...: 1 when it has not become true in time
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS <= deadline)) || return 1
    sleep 0.05
  done
}

gone() { [[ -z $(pid_of "$1") ]]; }

finish() { # name signal seconds: ask, wait, then SIGKILL
  local pid
  pid=$(pid_of "$1")
  if [[ -n $pid ]]; then
    kill "-$2" "$pid"
    until_true "$3" gone "$1" || kill -KILL "$pid"
  fi
  rm -f "$state/run/$1"
}

# --- preparation ---------------------------------------------------------------------------------

need_packages() {
  local missing=() command
  for command in slurmctld slurmd sbatch srun munged; do
    command -v "$command" >/dev/null || missing+=("$command")
  done
  ((${#missing[@]})) || return 0
  local wanted="apt-get install -y --no-install-recommends ${packages[*]}"
  command -v apt-get >/dev/null ||
    fail "found no ${missing[*]}; expected Slurm and munge (Debian: ${packages[*]})"
  ((UID == 0)) || fail "found no ${missing[*]}; as root run: apt-get update && $wanted"
  say "installing ${packages[*]}"
  export DEBIAN_FRONTEND=noninteractive
  if ! { apt-get update -qq && $wanted -qq; } >&2; then fail "could not install: $wanted"; fi
}

need_namespaces() {
  local problem
  problem=$(unshare "${namespaces[@]}" true 2>&1) && return 0
  say "this host does not permit the namespaces a node needs: $problem"
  if ((UID != 0)); then
    say "either run as root, or let root allow them, whichever of these exists here:"
    say "  sysctl -w user.max_user_namespaces=15000 kernel.unprivileged_userns_clone=1"
    say "  sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
  else
    say "in a container: run it with --privileged (or --cap-add SYS_ADMIN and an open seccomp)"
  fi
  exit 1
}

write_files() {
  local number name
  for ((number = 0; number < gpus; number++)); do
    ln -sfn /dev/null "$state/dev/gpu$number" # Slurm counts devices, these stand for GPUs
  done
  : >"$state/gres.conf"
  ((gpus == 0)) || echo "Name=gpu File=$state/dev/gpu[0-$((gpus - 1))]" >"$state/gres.conf"
  for ((number = 1; number <= nodes; number++)); do
    { # the node's own name first: it is what 127.0.0.1 is called there
      echo "127.0.0.1 node$number localhost"
      for ((name = 1; name <= nodes; name++)); do echo "127.0.0.1 node$name"; done
      echo "127.0.0.1 $(hostname)"
      cat /etc/hosts
    } >"$state/hosts.$number"
  done
  if [[ ! -s $state/munge/key ]]; then
    head -c 1024 /dev/urandom >"$state/munge/key"
    chmod 400 "$state/munge/key"
  fi
  write_slurm_conf >"$SLURM_CONF"
}

write_slurm_conf() {
  local user number
  user=$(id -un)
  cat <<CONF
ClusterName=megadistill
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SrunPortRange=$((port + 100))-$((port + 399))
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# A requeued job may start again once its credential has expired: 5 s instead of 120 s.
AuthInfo=socket=$state/munge.socket,cred_expire=5
StateSaveLocation=$state/state
SlurmdSpoolDir=$state/spool/%n
SlurmctldPidFile=$state/log/slurmctld.pid
SlurmdPidFile=$state/log/%n.pid
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdLogFile=$state/log/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
# More CPUs than the hardware has.
SlurmdParameters=config_overrides
# A preempted job gets the signal of its --signal option at once, not only at the time limit.
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
EnforcePartLimits=ALL
PropagateResourceLimits=NONE
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
KillWait=5
CompleteWait=0
MessageTimeout=10
TCPTimeout=2
SlurmctldTimeout=5
SlurmdTimeout=10
BatchStartTimeout=10
UnkillableStepTimeout=10
# Finished jobs stay visible to squeue for an hour: there is no accounting to ask.
MinJobAge=3600
NodeName=DEFAULT CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=16000$( ((gpus == 0)) || echo " Gres=gpu:$gpus")
CONF
  for ((number = 1; number <= nodes; number++)); do
    echo "NodeName=node$number NodeHostname=node$number NodeAddr=127.0.0.1 Port=$((port + number))"
  done
  cat <<CONF
PartitionName=DEFAULT Nodes=ALL MaxTime=1-0 DefaultTime=60
PartitionName=main Default=YES PriorityTier=1 GraceTime=15
PartitionName=high PriorityTier=10 PreemptMode=OFF
CONF
}

# --- commands ------------------------------------------------------------------------------------

boot() { # node number
  gone "node$1" || return 0
  finish "unshare$1" KILL 5 # left by a start that was interrupted here
  mkdir -p "$state/spool/node$1"
  # bash is the namespace's init: it reaps, and when it dies the kernel kills all of the node.
  # shellcheck disable=SC2016
  spawn "unshare$1" unshare "${namespaces[@]}" bash -c '
    hostname "$1" && mount --bind "$2" /etc/hosts || exit 1
    slurmd -D -N "$1" &
    wait $!' "$0" "node$1" "$state/hosts.$1"
  local parent children=
  parent=$!
  until_true 5 has_children "$parent" || fail "node$1 did not start: $(cat "$state/log/unshare$1.out")"
  read -r children <"/proc/$parent/task/$parent/children" || true # it ends without a newline
  remember "node$1" "${children%% *}"
}

has_children() {
  local children=
  read -r children 2>/dev/null <"/proc/$1/task/$1/children" || true
  [[ -n $children ]]
}

all_up() { [[ $(sinfo --noheader --Node --partition=main --states=idle,alloc,mix -o %N 2>/dev/null | wc -l) == "$nodes" ]]; }
controller_up() { scontrol ping 2>/dev/null | grep -q 'is UP'; }
munge_up() { munge --socket="$state/munge.socket" --no-input >/dev/null 2>&1; }

start() {
  need_packages
  need_namespaces
  ((${#state} <= 80)) || fail "MEGADISTILL_SLURM: found ${#state} characters, at most 80 fit a socket"
  id -un >/dev/null 2>&1 || fail "found no name for user $UID, Slurm needs one"
  mkdir -p "$state"/{state,spool,dev,run,log,munge}
  [[ -O $state ]] || fail "MEGADISTILL_SLURM: $state belongs to somebody else, expected your own"
  chmod 755 "$state"
  chmod 700 "$state"/{state,munge}
  exec 9>"$state/lock"
  flock -w 60 9 || fail "another start or stop has been at work in $state for a minute"
  if gone slurmctld; then
    write_files
  elif ! write_slurm_conf | cmp -s - "$SLURM_CONF"; then
    fail "it runs with other settings (see $SLURM_CONF); stop it first"
  fi
  if gone munged; then
    # --force: the state directory may lie below one that only this user may enter
    spawn munged munged --foreground --force --key-file="$state/munge/key" --socket="$state/munge.socket" \
      --pid-file="$state/munge/pid" --log-file="$state/munge/log" --seed-file="$state/munge/seed"
    until_true 10 munge_up || fail "munged does not answer: $(tail -n 5 "$state/log/munged.out")"
  fi
  if gone slurmctld; then
    spawn slurmctld slurmctld -D -i
    until_true 15 controller_up || fail "slurmctld does not answer: $(tail -n 5 "$state/log/slurmctld.log")"
  fi
  local number
  for ((number = 1; number <= nodes; number++)); do boot "$number"; done
  if ! until_true 30 all_up; then
    sinfo >&2
    fail "not all of $nodes nodes came up within 30 s; see $state/log"
  fi
  say "$nodes nodes are up; for sbatch, squeue, ... in this shell: eval \"\$($here/local_cluster.sh env)\""
}

environment() {
  [[ -f $SLURM_CONF ]] || fail "found no cluster in $state; run: $here/local_cluster.sh start"
  # shellcheck disable=SC2016
  printf 'export SLURM_CONF=%q\nexport PATH=%q:"$PATH"\n' "$SLURM_CONF" "$here/no_accounting"
}

stop() {
  [[ -d $state/run ]] || return 0
  exec 9>"$state/lock"
  flock -w 60 9 || fail "another start or stop has been at work in $state for a minute"
  if ! gone slurmctld; then
    scancel --quiet --user="$(id -un)" || true
    until_true 2 no_jobs || true # the nodes' end below takes what is left
  fi
  local file
  for file in "$state"/run/node*; do
    [[ ! -e $file ]] || finish "${file##*/}" KILL 5
  done
  for file in "$state"/run/unshare*; do
    [[ ! -e $file ]] || finish "${file##*/}" TERM 5
  done
  finish slurmctld TERM 10 # writes its state, so that job numbers go on
  finish munged TERM 5
  say "stopped"
}

no_jobs() { [[ -z $(squeue --noheader 2>/dev/null) ]]; }

status() {
  local file name running=0
  for file in "$state"/run/*; do
    [[ -e $file && $file != */unshare* ]] || continue
    name=${file##*/}
    if gone "$name"; then
      printf '%-10s not running\n' "$name"
    else
      printf '%-10s pid %s\n' "$name" "$(pid_of "$name")"
      running=1
    fi
  done
  if ((running == 0)); then
    echo "no cluster runs in $state"
    exit 3
  fi
  sinfo --Node --long
  squeue --long
}

check_node() {
  if ! [[ ${1:-} =~ ^[1-9][0-9]?$ && $1 -le $nodes ]]; then
    fail "found node '${1:-}', expected a number from 1 to $nodes"
  fi
}

case ${1:-} in
  install) need_packages ;;
  start) start ;;
  stop) stop ;;
  status) status ;;
  env) environment ;;
  kill)
    check_node "${2:-}"
    gone "node$2" || finish "node$2" KILL 5
    ;;
  node)
    check_node "${2:-}"
    boot "$2"
    ;;
  *)
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
