#!/usr/bin/env bash
# Trains on the GPU nodes of a Slurm cluster. Settings: launch/settings.sh.
#
# usage: launch/slurm.sh [--dry-run] [-- arguments of maskgen.main]
#   launch/slurm.sh -- --config=configs/mage_base.py --workdir=/shared/runs/mage_base
#
# The script submits itself with sbatch: activate the environment with maskgen first. Inside an allocation it
# runs the training. The job saves and is requeued before its time limit, on preemption and after a crash,
# until the run has finished.
#
# There is one task per GPU, and all tasks see all GPUs of their node: on Slurm, JAX gives each process the
# GPU with the task's number on the node. So the job takes whole nodes and does not use --gpus-per-task.
set -euo pipefail
folder=$(dirname "${BASH_SOURCE[0]}")
# Slurm runs a copy of this script in the folder of --chdir.
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

# The job. Signals go to the job and not to srun, which would turn TERM into KILL.
work() {
  eval "export $WORKER_ENV"
  local told=no
  trap 'told=yes; run scancel --signal=TERM "$SLURM_JOB_ID" || true' TERM
  run "${STEP[@]}" &
  local status=0 step=$!
  wait "$step" || status=$?
  while kill -0 "$step" 2> /dev/null; do
    wait "$step" && status=0 || status=$?
  done
  # Beside the log, since Slurm counts all restarts, also those after time limits and preemptions.
  local file=$RUN_NAME-$SLURM_JOB_ID.crashes crashes=0
  if [[ -e $file && $SECONDS -lt $RESET_SECONDS ]]; then crashes=$(< "$file"); fi
  if [[ $status == 0 || $told == yes ]]; then rm -f "$file"; else echo $((crashes + 1)) > "$file"; fi
  if [[ -e $WORKDIR/results.json ]]; then
    say "finished: $WORKDIR/results.json exists"
  elif [[ $status == 2 ]]; then
    die "status 2 is an error that a restart cannot fix"
  elif [[ -e $file && $crashes -ge $MAX_RESTARTS ]]; then
    say "exited with status $status; giving up after $MAX_RESTARTS restarts"
    exit "$status"
  else
    say "exited with status $status: requeueing"
    run scontrol requeue Incomplete "$SLURM_JOB_ID" # has no effect if it was cancelled
  fi
}

if [[ -n ${SLURM_JOB_ID:-} ]]; then
  work
else
  submit
  # The job's own command.
  if [[ $DRY_RUN == yes ]]; then run "${STEP[@]}"; fi
fi
