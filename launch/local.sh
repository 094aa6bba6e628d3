#!/usr/bin/env bash
# Trains with N processes on this machine, and starts all of them again when one dies.
#
# usage: launch/local.sh [--dry-run] N [-- arguments of maskgen.main]
#   launch/local.sh 2 -- --config=configs/quickstart.py --workdir=runs/quickstart
#
# How many CPU devices a process has is XLA's to say: XLA_FLAGS=--xla_force_host_platform_device_count=4.
# Ctrl-C or TERM lets the run save and ends it; a second one does not wait for that. So does TERM to one of the
# processes, and the script then ends with 0.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "$@"
[[ ${#WORDS[@]} -eq 1 && ${WORDS[0]} =~ ^[1-9][0-9]*$ ]] ||
  die "give the number of processes: launch/local.sh N [-- arguments of maskgen.main]"
COUNT=${WORDS[0]}
need_python

PIDS=()     # of the processes, each the leader of a group of its own
READERS=()  # of what prefixes their output
STATUSES=() # of the processes that have ended; empty while one runs
TOLD=()     # the signals that this script was sent

free_port() {
  local port
  while port=$((20000 + RANDOM % 10000)); do
    (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null || break
  done
  echo "$port"
}

nap() { sleep 0.2 || true; } # Ctrl-C ends sleep, too

prefix() {
  trap '' HUP INT TERM # the last words of a process count, too
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
    set -m # a group of its own, so that nothing it has started can be left behind
    "${command[@]}" < /dev/null >&"$output" 2>&1 {output}>&- &
    set +m
    PIDS+=("$!") STATUSES+=("")
    exec {output}>&-
  done
}

# Notes who has ended; true while somebody runs.
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

# The status that ended the run: 2 before others, since it is the cause; 0 if there is none.
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

# TERM, then KILL after so many seconds, and nothing is left of any group.
end_all() {
  local deadline=$((SECONDS + $1)) pid index
  for index in "${!PIDS[@]}"; do
    [[ -n ${STATUSES[index]} ]] || kill -TERM "${PIDS[index]}" 2> /dev/null || true
  done
  while any_runs && ((SECONDS < deadline && ${#TOLD[@]} < 2)); do nap; done
  for pid in "${PIDS[@]}"; do kill -KILL -- "-$pid" 2> /dev/null || true; done
  while any_runs; do nap; done
  wait "${READERS[@]}" || true
}

leave_if_told() {
  ((${#TOLD[@]})) || return 0
  if any_runs; then say "${TOLD[0]}: the processes may take $SAVE_SECONDS s to save"; fi
  end_all "$SAVE_SECONDS"
  trap - EXIT
  case ${TOLD[0]} in HUP) exit 129 ;; INT) exit 130 ;; TERM) exit 143 ;; esac
}

if [[ $DRY_RUN == yes ]]; then
  start
  exit
fi
for signal in HUP INT TERM; do
  # shellcheck disable=SC2064  # the name of this round's signal
  trap "TOLD+=($signal)" "$signal"
done
trap 'end_all 0' EXIT

restarts=0
while true; do
  began=$SECONDS
  start
  while any_runs && [[ $(failure) == 0 ]] && ! ((${#TOLD[@]})); do nap; done
  leave_if_told
  status=$(failure)
  for index in "${!PIDS[@]}"; do
    case ${STATUSES[index]} in '' | 0) ;; *) say "process $index ended with status ${STATUSES[index]}" ;; esac
  done
  end_all "$GRACE_SECONDS"
  [[ $status != 0 ]] || exit 0
  leave_if_told
  if [[ $status == 2 ]]; then
    say "status 2 is an error that a restart does not mend"
    exit 2
  fi
  ((SECONDS - began < RESET_SECONDS)) || restarts=0
  if ((restarts >= MAX_RESTARTS)); then
    say "gave up after $restarts restarts"
    exit "$status"
  fi
  pause=$((restarts < 6 ? 2 ** restarts : 60))
  restarts=$((restarts + 1))
  say "all processes start again in $pause s (restart $restarts of $MAX_RESTARTS)"
  until=$((SECONDS + pause))
  while ((SECONDS < until)); do
    leave_if_told
    nap
  done
done
