#!/usr/bin/env bash
# Trains with N processes on this machine, and restarts all of them when one dies.
#
# usage: launch/local.sh [--dry-run] N [-- arguments of maskgen.main]
#   launch/local.sh 2 -- --config=configs/quickstart.py --workdir=runs/quickstart
#
# XLA_FLAGS=--xla_force_host_platform_device_count=4 sets the number of CPU devices per process. Ctrl-C or
# TERM lets the run save and stops it; a second one does not wait for that. TERM to one of the processes does
# the same, and the script then exits with 0.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "$@"
[[ ${#WORDS[@]} -eq 1 && ${WORDS[0]} =~ ^[1-9][0-9]*$ ]] ||
  die "give the number of processes: launch/local.sh N [-- arguments of maskgen.main]"
COUNT=${WORDS[0]}
need_python

PIDS=()     # of the processes, each the leader of its own process group
READERS=()  # PIDs of the subshells that prefix their output
STATUSES=() # of the processes that have exited; empty for those that run
SIGNALS=()  # the signals that this script has received

free_port() {
  local port
  while port=$((20000 + RANDOM % 10000)); do
    (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null || break
  done
  echo "$port"
}

nap() { sleep 0.2 || true; } # Ctrl-C also ends sleep

prefix() {
  trap '' HUP INT TERM # prefix the last output of a process, too
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '%s: %s\n' "$1" "$line"; done
}

start() {
  local index port output
  port=$(free_port)
  PIDS=() READERS=() STATUSES=()
  for ((index = 0; index < COUNT; index++)); do
    local command=(
      "${MAIN[@]}" "--coordinator=127.0.0.1:$port" "--process_count=$COUNT" "--process_index=$index"
    )
    if [[ $DRY_RUN == yes ]]; then
      echo "$(quote "${command[@]}") &"
      continue
    fi
    exec {output}> >(prefix "$index")
    READERS+=("$!")
    set -m # its own process group, so that its children can be killed, too
    "${command[@]}" < /dev/null >&"$output" 2>&1 {output}>&- &
    set +m
    PIDS+=("$!") STATUSES+=("")
    exec {output}>&-
  done
}

# Records the statuses of exited processes; true while any process runs.
any_runs() {
  local index any=1
  for index in "${!PIDS[@]}"; do
    [[ -z ${STATUSES[index]} ]] || continue
    if kill -0 "${PIDS[index]}" 2> /dev/null; then
      any=0
    else
      wait "${PIDS[index]}" && STATUSES[index]=0 || STATUSES[index]=$?
    fi
  done
  return "$any"
}

# The status that ended the run: 2 if any process has it, since that is the cause, or another one.
failure() {
  local status worst=0
  for status in "${STATUSES[@]}"; do
    case ${status:-0} in
      0) ;;
      2) worst=2 && break ;;
      *) worst=$status ;;
    esac
  done
  echo "$worst"
}

# Sends TERM, after $1 seconds KILL to all process groups, and waits until nothing is left.
end_all() {
  local deadline=$((SECONDS + $1)) pid index
  for index in "${!PIDS[@]}"; do
    [[ -n ${STATUSES[index]} ]] || kill -TERM "${PIDS[index]}" 2> /dev/null || true
  done
  while any_runs && ((SECONDS < deadline && ${#SIGNALS[@]} < 2)); do nap; done
  for pid in "${PIDS[@]}"; do kill -KILL -- "-$pid" 2> /dev/null || true; done
  while any_runs; do nap; done
  wait "${READERS[@]}" || true
}

exit_if_signalled() {
  ((${#SIGNALS[@]})) || return 0
  if any_runs; then say "${SIGNALS[0]}: waiting up to $SAVE_SECONDS s for the processes to save"; fi
  end_all "$SAVE_SECONDS"
  trap - EXIT
  case ${SIGNALS[0]} in HUP) exit 129 ;; INT) exit 130 ;; TERM) exit 143 ;; esac
}

if [[ $DRY_RUN == yes ]]; then
  start
  exit
fi
for signal in HUP INT TERM; do
  # shellcheck disable=SC2064  # expands to this iteration's signal
  trap "SIGNALS+=($signal)" "$signal"
done
trap 'end_all 0' EXIT

restarts=0
while true; do
  began=$SECONDS
  start
  while any_runs && [[ $(failure) == 0 ]] && ! ((${#SIGNALS[@]})); do nap; done
  exit_if_signalled
  status=$(failure)
  for index in "${!PIDS[@]}"; do
    case ${STATUSES[index]} in '' | 0) ;; *) say "process $index exited with ${STATUSES[index]}" ;; esac
  done
  end_all "$GRACE_SECONDS"
  [[ $status != 0 ]] || exit 0
  exit_if_signalled
  if [[ $status == 2 ]]; then
    say "status 2 is an error that a restart cannot fix"
    exit 2
  fi
  ((SECONDS - began < RESET_SECONDS)) || restarts=0
  if ((restarts >= MAX_RESTARTS)); then
    say "giving up after $restarts restarts"
    exit "$status"
  fi
  pause=$((restarts < 6 ? 2 ** restarts : 60))
  restarts=$((restarts + 1))
  say "restarting all processes in $pause s (restart $restarts of $MAX_RESTARTS)"
  until=$((SECONDS + pause))
  while ((SECONDS < until)); do
    exit_if_signalled
    nap
  done
done
