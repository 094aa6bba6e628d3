# shellcheck shell=bash
# All settings of launch/, to be edited here; environment variables of the same name take precedence.

# What runs
: "${CONFIG:=configs/quickstart.py}"
: "${WORKDIR:=runs/quickstart}" # for TPUs gs://BUCKET/FOLDER, for Slurm a folder that all nodes share
: "${RUN_NAME:=maskgen}"        # of the slice or job: lower-case letters, digits and dashes
# Environment variables of the processes on TPUs and Slurm, in shell syntax. PYTHONFAULTHANDLER shows where a
# process hangs, see docs/hangs.md; those of TensorStore abort stalled transfers to Cloud Storage.
: "${WORKER_ENV:=PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1 \
TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=60 TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=256}"

# Restarts
: "${MAX_RESTARTS:=10}"   # give up after this many consecutive crashes; preemptions and time limits do not count
: "${RESET_SECONDS:=600}" # a crash after running this long starts a new count; on GKE, it does not count
: "${SAVE_SECONDS:=120}"  # time for a run to save after a signal to stop
: "${GRACE_SECONDS:=5}"   # local.sh: time for the other processes to exit when one has died

# Cloud TPU VMs
: "${PROJECT:=}"
: "${ZONE:=}"
: "${ACCELERATOR_TYPE:=v5litepod-16}"
: "${RUNTIME_VERSION:=v2-alpha-tpuv5-lite}"
: "${CREATE_WITH:=create}" # how watch creates a slice: create, or queue for a queued resource
: "${CREATE_FLAGS:=}"      # more flags of gcloud's create, such as --spot or --service-account=...
: "${SSH_FLAGS:=}"         # more flags of gcloud's ssh and scp, such as --internal-ip
: "${PACKAGE:=}"           # to install: git+https://HOST/REPOSITORY@BRANCH, or the local path of a wheel
: "${POLL_SECONDS:=60}"    # interval at which watch polls
: "${DELETE_WHEN_FINISHED:=no}" # yes: watch deletes the slice when the run has finished

# GKE
: "${NAMESPACE:=default}"
: "${SERVICE_ACCOUNT:=default}" # Kubernetes service account with write access to WORKDIR
: "${IMAGE:=}" # with python 3.11 or newer and maskgen[tpu], see launch/Dockerfile
: "${GKE_ACCELERATOR:=tpu-v5-lite-podslice}"
: "${TOPOLOGY:=4x4}"
: "${CHIPS_PER_HOST:=4}"
: "${SLICES:=1}"

# Slurm
: "${NODES:=1}"
: "${GPUS_PER_NODE:=8}"
: "${CPUS_PER_GPU:=8}"
: "${TIME_LIMIT:=24:00:00}"
: "${SBATCH_FLAGS:=}" # more flags of sbatch, such as --partition=... --account=...
