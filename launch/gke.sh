#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a JobSet. Settings: launch/settings.sh.
#
# usage: launch/gke.sh [--dry-run] COMMAND [--worker=N] [-- arguments of maskgen.main]
#   apply   starts the run; the cluster restarts it after preemptions, which do not count, and crashes
#   logs    follows the log of worker 0 of the first slice, or of another
#   delete  lets the run save, and stops it
#
#   launch/gke.sh apply -- --config=configs/mage_base.py --workdir=gs://BUCKET/mage_base
#
# kubectl must point to the cluster: gcloud container clusters get-credentials CLUSTER. Each run needs its own
# RUN_NAME.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "$@"
COMMAND=${WORDS[0]:-}
[[ ${#WORDS[@]} -eq 1 && $COMMAND =~ ^(apply|logs|delete)$ ]] || die "give one of apply, logs, delete"
[[ $WORKER =~ ^[0-9]+$ ]] || die "--worker=$WORKER: give a number"
need NAMESPACE
need_run_name

# The number of hosts of one slice: its chips divided by the chips of a host.
# shellcheck disable=SC2034  # manifest reads HOSTS, MAIN_LINE and RESULTS by their names
count_hosts() {
  [[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || die "TOPOLOGY='$TOPOLOGY': give 4x4 or 4x4x4"
  [[ $CHIPS_PER_HOST =~ ^[1-9][0-9]*$ ]] || die "CHIPS_PER_HOST='$CHIPS_PER_HOST': give a number"
  local chips=$((${TOPOLOGY//x/*}))
  ((chips % CHIPS_PER_HOST == 0)) ||
    die "the $chips chips of TOPOLOGY=$TOPOLOGY are not a multiple of CHIPS_PER_HOST=$CHIPS_PER_HOST"
  HOSTS=$((chips / CHIPS_PER_HOST))
}

# Substitutes only the names listed here: the pod's shell expands the others.
manifest() {
  local text name
  text=$(< "$(dirname "${BASH_SOURCE[0]}")/jobset.yaml")
  for name in RUN_NAME NAMESPACE SERVICE_ACCOUNT MAX_RESTARTS RESET_SECONDS SLICES HOSTS SAVE_SECONDS \
    GKE_ACCELERATOR TOPOLOGY IMAGE WORKER_ENV MAIN_LINE RESULTS CHIPS_PER_HOST; do
    text=${text//"\${$name}"/"${!name}"}
  done
  printf '%s\n' "$text"
}

# shellcheck disable=SC2034
apply() {
  need IMAGE SERVICE_ACCOUNT GKE_ACCELERATOR SLICES
  need_bucket
  count_hosts
  MAIN_LINE=$(quote "${MAIN[@]}")
  RESULTS=$(quote "$WORKDIR/results.json")
  local command=(kubectl apply --filename=-)
  if [[ $DRY_RUN == yes ]]; then
    echo "$(quote "${command[@]}") <<'JOBSET'"
    manifest
    echo JOBSET
  else
    manifest | "${command[@]}"
  fi
}

logs() {
  local labels="jobset.sigs.k8s.io/jobset-name=$RUN_NAME,jobset.sigs.k8s.io/job-index=0"
  run kubectl logs "--namespace=$NAMESPACE" --follow --tail=100 \
    "--selector=$labels,batch.kubernetes.io/job-completion-index=$WORKER"
}

delete() { run kubectl delete jobset "$RUN_NAME" "--namespace=$NAMESPACE"; }

"$COMMAND"
