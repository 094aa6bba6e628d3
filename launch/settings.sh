# shellcheck shell=bash
# All settings of launch/, to edit here; a variable of the same name in the environment wins.

# What runs
: "${CONFIG:=configs/quickstart.py}"
: "${WORKDIR:=runs/quickstart}" # TPUs need gs://BUCKET/FOLDER, Slurm a folder that all nodes share
: "${RUN_NAME:=maskgen}"        # name of the slice or job: lower case letters, digits and dashes
# Variables of the processes on TPUs and Slurm, as a shell takes them. PYTHONFAULTHANDLER shows where a
# process hangs, see docs/hangs.md; those of TensorStore end transfers to Cloud Storage that stand still.
: "${WORKER_ENV:=PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1 \
TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=60 TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=256}"

# Restarts
: "${MAX_RESTARTS:=10}"   # after so many crashes in a row the run is given up
: "${RESET_SECONDS:=600}" # a crash after so long a run is not in a row with earlier ones
: "${SAVE_SECONDS:=120}"  # how long a run that is told to stop may take to save
: "${GRACE_SECONDS:=5}"   # local.sh: how long processes may take to end when another has died

# Cloud TPU VMs
: "${PROJECT:=}"
: "${ZONE:=}"
: "${ACCELERATOR_TYPE:=v5litepod-16}"
: "${RUNTIME_VERSION:=v2-alpha-tpuv5-lite}"
: "${CREATE_WITH:=create}" # what watch makes a slice with: create, or queue for a queued resource
: "${CREATE_FLAGS:=}"      # more flags of gcloud's create, such as --spot or --service-account=...
: "${SSH_FLAGS:=}"         # more flags of gcloud's ssh and scp, such as --internal-ip
: "${PACKAGE:=}"           # to install: git+https://HOST/REPOSITORY@BRANCH, or the path of a wheel here
: "${POLL_SECONDS:=60}"    # how often watch looks
: "${DELETE_WHEN_FINISHED:=no}" # yes: watch deletes the slice when the run has finished

# GKE
: "${NAMESPACE:=default}"
: "${SERVICE_ACCOUNT:=default}" # the Kubernetes account that may write to WORKDIR
: "${IMAGE:=}" # has python 3.11 or newer and maskgen[tpu]
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
