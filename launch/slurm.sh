#!/usr/bin/env bash
# Trains on the GPU nodes of a Slurm cluster. Settings: launch/settings.sh.
#
# usage: launch/slurm.sh [--dry-run] [-- arguments of maskgen.main]
#   launch/slurm.sh -- --config=configs/mage_base.py --workdir=/shared/runs/mage_base
#
# It submits itself with sbatch, from the environment in which python has maskgen; inside an allocation it
# runs there. The job saves and is queued again before its time limit, when it is preempted and after a crash,
# until the run has finished.
#
# One task per GPU, all of which see all GPUs of their node: on Slurm, JAX gives each process the GPU that has
# the task's number on the node. So whole nodes are taken, and no --gpus-per-task.
set -euo pipefail
folder=$(dirname "${BASH_SOURCE[0]}")
# Slurm runs a copy of this script, in the folder that --chdir gives.
if [[ -n ${SLURM_JOB_ID:-} && ! -e $folder/common.sh ]]; then folder=$PWD/launch; fi
# shellcheck source=launch/common.sh
source "$folder/common.sh"

parse "$@"
((${#WORDS[@]} == 0)) ||
  die "'${WORDS[0]}' is not understood, see --help; arguments of maskgen.main follow a --"
[[ $WORKDIR != *://* ]] || die "WORKDIR='$WORKDIR': give a folder that all nodes share"
[[ $GPUS_PER_NODE =~ ^[1-9][0-9]*$ ]] || die "GPUS_PER_NODE='$GPUS_PER_NODE': give a number"
need_python
need_run_name
read -ra MORE <<< "$SBATCH_FLAGS"
STEP=(srun --kill-on-bad-exit=1 --label "--cpus-per-task=$CPUS_PER_GPU" "${MAIN[@]}")

submit() {
  local root
  root=$(cd "$folder/.." && pwd)
  run sbatch "--job-name=$RUN_NAME" "--chdir=$root" "--output=$RUN_NAME-%j.log" --open-mode=append \
    "--nodes=$NODES" --exclusive --mem=0 "--gpus-per-node=$GPUS_PER_NODE" \
    "--ntasks-per-node=$GPUS_PER_NODE" "--cpus-per-task=$CPUS_PER_GPU" "--time=$TIME_LIMIT" \
    "--signal=B:TERM@$SAVE_SECONDS" --requeue "${MORE[@]}" "$root/launch/slurm.sh" -- "${ARGUMENTS[@]}"
}

# The job. Not to srun goes the signal: it would pass TERM on as KILL.
work() {
  eval "export $WORKER_ENV"
  trap 'run scancel --signal=TERM "$SLURM_JOB_ID" || true' TERM
  run "${STEP[@]}" &
  local status=0 step=$!
  wait "$step" || status=$?
  while kill -0 "$step" 2> /dev/null; do
    wait "$step" && status=0 || status=$?
  done
  if [[ -e $WORKDIR/results.json ]]; then
    say "finished, $WORKDIR/results.json is there"
  elif [[ $status == 2 ]]; then
    die "status 2 is an error that a restart does not mend"
  elif [[ $status != 0 && ${SLURM_RESTART_COUNT:-0} -ge $MAX_RESTARTS ]]; then
    say "ended with status $status, and gave up after $MAX_RESTARTS restarts"
    exit "$status"
  else
    say "ended with status $status: queued again"
    run scontrol requeue Incomplete "$SLURM_JOB_ID" # not if it was cancelled
  fi
}

if [[ -n ${SLURM_JOB_ID:-} ]]; then
  work
else
  submit
  # What the job runs.
  if [[ $DRY_RUN == yes ]]; then run "${STEP[@]}"; fi
fi
