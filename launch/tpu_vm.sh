#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs. Settings: launch/settings.sh.
#
# usage: launch/tpu_vm.sh [--dry-run] COMMAND [--worker=N] [-- arguments of maskgen.main]
#   create  makes the slice now
#   queue   requests the slice as a queued resource
#   setup   installs PACKAGE on all workers
#   run     starts the training on all workers, in the background
#   logs    follows the log of worker 0, or of another
#   watch   does all of this, and repeats it after preemptions and crashes, until the run has finished
#   stop    lets the run save, and stops it on all workers
#   delete  deletes the slice
#
#   launch/tpu_vm.sh watch -- --config=configs/mage_base.py --workdir=gs://BUCKET/mage_base
#
# For several workers, gcloud requires `ssh-add ~/.ssh/google_compute_engine` once.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "$@"
COMMAND=${WORDS[0]:-}
[[ ${#WORDS[@]} -eq 1 && $COMMAND =~ ^(create|queue|setup|run|logs|watch|stop|delete)$ ]] ||
  die "give one of create, queue, setup, run, logs, watch, stop, delete"
[[ $WORKER =~ ^[0-9]+$ ]] || die "--worker=$WORKER: give a number"
[[ $CREATE_WITH =~ ^(create|queue)$ ]] || die "CREATE_WITH='$CREATE_WITH': give create or queue"
need PROJECT ZONE ACCELERATOR_TYPE RUNTIME_VERSION
need_run_name
PLACE=("--project=$PROJECT" "--zone=$ZONE")
read -ra MORE_CREATE <<< "$CREATE_FLAGS"
read -ra MORE_SSH <<< "$SSH_FLAGS"
TPUS=(gcloud compute tpus)

on_worker() {
  run "${TPUS[@]}" tpu-vm ssh "$RUN_NAME" "${PLACE[@]}" "${MORE_SSH[@]}" "--worker=$1" "--command=$2"
}

# Commands on the workers. All files are in ~/maskgen-run. A run holds run.lock, which shows whether it is
# alive even after crashes, reboots and repeated starts.

# shellcheck disable=SC2016  # workers expand these
refuse_second='mkdir -p maskgen-run && cd maskgen-run || exit 1
if ! flock --nonblock run.lock true; then echo "already running on $(hostname)" >&2; exit 3; fi'

install="set -e
mkdir -p maskgen-run && cd maskgen-run
command -v ~/.local/bin/uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv venv --quiet --allow-existing --python=3.12 venv
~/.local/bin/uv pip install --quiet --python=venv/bin/python --reinstall-package=maskgen"

# Runs in the background, survives the end of the ssh session, and writes its exit status to a file.
start="cd maskgen-run && . venv/bin/activate || exit 1
rm -f run.status
(
  trap '' HUP
  exec 9> run.lock
  flock --nonblock 9 || exit 3
  export $WORKER_ENV
  $(quote "${MAIN[@]}") &
  echo \$! > run.pid
  wait \$!
  echo \$? > run.status
) >> run.log 2>&1 < /dev/null &"

# shellcheck disable=SC2016
report='cd maskgen-run 2> /dev/null || { echo absent; exit; }
if ! flock --nonblock run.lock true; then echo running
elif [ -e run.status ]; then echo "ended $(cat run.status)"
else echo absent; fi'

end="cd maskgen-run 2> /dev/null || exit 0
flock --nonblock run.lock true && exit 0
kill -TERM \"\$(cat run.pid)\"
flock --wait $SAVE_SECONDS run.lock true && exit 0
echo \"did not exit within $SAVE_SECONDS s on \$(hostname): killed\" >&2
kill -KILL \"\$(cat run.pid)\"
flock --wait 10 run.lock true"

# The commands

create() {
  run "${TPUS[@]}" tpu-vm create "$RUN_NAME" "${PLACE[@]}" "--accelerator-type=$ACCELERATOR_TYPE" \
    "--version=$RUNTIME_VERSION" "${MORE_CREATE[@]}"
}

queue() {
  run "${TPUS[@]}" queued-resources create "$RUN_NAME" "--node-id=$RUN_NAME" "${PLACE[@]}" \
    "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION" "${MORE_CREATE[@]}"
}

setup() {
  need PACKAGE
  local source=$PACKAGE
  if [[ $PACKAGE == *.whl && $PACKAGE != *://* ]]; then
    [[ -f $PACKAGE || $DRY_RUN == yes ]] || die "PACKAGE='$PACKAGE' does not exist"
    run "${TPUS[@]}" tpu-vm scp "$PACKAGE" "$RUN_NAME:" "${PLACE[@]}" "${MORE_SSH[@]}" --worker=all
    source="file://\$HOME/${PACKAGE##*/}"
  fi
  on_worker all "$install \"maskgen[tpu] @ $source\""
}

# Checks all workers before it starts any: a partially started pod would hang.
run_all() {
  need_bucket
  local status=0
  on_worker all "$refuse_second" || status=$?
  [[ $status != 3 ]] || die "$RUN_NAME is already running: stop it with launch/tpu_vm.sh stop"
  [[ $status == 0 ]] || exit "$status"
  on_worker all "$start"
}

delete() {
  if [[ $CREATE_WITH == queue ]]; then
    run "${TPUS[@]}" queued-resources delete "$RUN_NAME" "${PLACE[@]}" --force --quiet
  else
    run "${TPUS[@]}" tpu-vm delete "$RUN_NAME" "${PLACE[@]}" --quiet
  fi
}

# The state of the slice, or of its request until that is ACTIVE; empty if there is none. Unlike `describe`,
# `list` distinguishes a missing slice from a failed query, after which nothing is done.
state() {
  local named="--filter=name~(^|/)$RUN_NAME\$" request='' node=''
  if [[ $CREATE_WITH == queue ]]; then
    request=$("${TPUS[@]}" queued-resources list "${PLACE[@]}" "$named" "--format=value(state.state)") ||
      return
  fi
  if [[ $CREATE_WITH == create || $request == ACTIVE ]]; then
    node=$("${TPUS[@]}" tpu-vm list "${PLACE[@]}" "$named" "--format=value(state)") || return
  fi
  echo "${node:-$request}"
}

finished() { run gcloud storage ls "$WORKDIR/results.json" > /dev/null 2>&1; }

# Runs another command of this script with the same settings; failures are retried at the next poll.
step() {
  say "$RUN_NAME: $1"
  "$BASH" "$0" "$1" -- "${ARGUMENTS[@]}" || { say "$RUN_NAME: $1 failed with status $?" && return 1; }
}

crashes=0 began=0
start_again() {
  began=$SECONDS
  step stop && step run || true
}

# Asks only worker 0: when a worker dies, the others lose its heartbeat and exit within two minutes.
look_after_run() {
  local answer
  answer=$(on_worker 0 "$report" | tail -n 1) || answer=
  case $answer in
    running) ;;
    absent)
      began=$SECONDS
      step setup && step run || true
      ;;
    'ended 2') die "status 2 is an error that a restart cannot fix: see launch/tpu_vm.sh logs" ;;
    'ended 0') finished || start_again ;; # stopped by a signal, as before maintenance
    'ended '*)
      ((SECONDS - began < RESET_SECONDS)) || crashes=0
      crashes=$((crashes + 1))
      say "$RUN_NAME: the run $answer, consecutive crash $crashes"
      ((crashes <= MAX_RESTARTS)) || die "giving up after $MAX_RESTARTS restarts: see launch/tpu_vm.sh logs"
      start_again
      ;;
    *) say "$RUN_NAME: worker 0 does not answer" ;;
  esac
}

# Starts a slice of one host that somebody has stopped; larger ones cannot be stopped.
boot() { run "${TPUS[@]}" tpu-vm start "$RUN_NAME" "${PLACE[@]}"; }

watch() {
  need PACKAGE
  need_bucket
  local now before=
  # Also after errors and Ctrl-C, even where a call has its output elsewhere.
  exec 3>&2
  trap 'say "$RUN_NAME: the slice still costs money: delete it with launch/tpu_vm.sh delete" 2>&3' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  until finished; do
    if now=$(state); then
      [[ $now == "$before" ]] || say "$RUN_NAME: ${now:-there is no slice}"
      before=$now
      case $now in
        READY) look_after_run ;;
        '') step "$CREATE_WITH" || true ;;
        STOPPED) boot || say "$RUN_NAME: start failed with status $?" ;;
        PREEMPTED | TERMINATED | UNKNOWN | FAILED | SUSPENDED)
          crashes=0
          if step delete; then step "$CREATE_WITH" || true; fi
          ;;
        *) ;; # changes by itself, such as CREATING, REPAIRING and WAITING_FOR_RESOURCES
      esac
    else
      say "$RUN_NAME: the state cannot be read"
    fi
    sleep "$POLL_SECONDS"
  done
  say "$RUN_NAME: finished: $WORKDIR/results.json exists"
  if [[ $DELETE_WHEN_FINISHED == yes ]]; then
    delete
    trap - EXIT
  fi
}

# Prints what watch does after a preemption.
watch_dry() {
  need PACKAGE
  need_bucket
  run gcloud storage ls "$WORKDIR/results.json"
  delete
  "$CREATE_WITH"
  setup
  run_all
}

case $COMMAND in
  create | queue | setup | delete) "$COMMAND" ;;
  run) run_all ;;
  logs) on_worker "$WORKER" 'tail -n 100 -F maskgen-run/run.log' ;;
  stop) on_worker all "$end" ;;
  watch) if [[ $DRY_RUN == yes ]]; then watch_dry; else watch; fi ;;
esac
