# shellcheck shell=bash disable=SC2034  # the scripts use what is set here
# Functions that the scripts of launch/ share; they source this file.

say() { printf 'launch: %s\n' "$*" >&2; }

# Reports a user error like maskgen itself: one sentence and status 2.
die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "bash $BASH_VERSION is too old: use 4.4 or newer"

# The settings are exported, so that a Slurm job uses those at its submission.
set -o allexport
# shellcheck source=launch/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
set +o allexport

# Prints the comment at the top of a script as its help.
usage() { sed -n '2,/^[^#]/ { s/^# \{0,1\}//p }' "$0"; }

# Parses --dry-run, --worker=N, the arguments of maskgen.main after `--`, and the rest as WORDS.
parse() {
  DRY_RUN=no WORKER=0 WORDS=()
  local extra=()
  while (($#)); do
    case $1 in
      --) shift && break ;;
      --dry-run) DRY_RUN=yes ;;
      --worker=*) WORKER=${1#*=} ;;
      -h | --help) usage && exit 0 ;;
      -*) die "option '$1' is not understood, see --help; arguments of maskgen.main follow a --" ;;
      *) WORDS+=("$1") ;;
    esac
    shift
  done
  while (($#)); do
    case $1 in
      --config=*) CONFIG=${1#*=} ;;
      --workdir=*) WORKDIR=${1#*=} ;;
      *) extra+=("$1") ;;
    esac
    shift
  done
  WORKDIR=${WORKDIR%/}
  ARGUMENTS=("--config=$CONFIG" "--workdir=$WORKDIR" "${extra[@]}")
  MAIN=(python -m maskgen.main "${ARGUMENTS[@]}")
}

# Fails unless all named settings have a value.
need() {
  local name
  for name in "$@"; do
    [[ -n ${!name} ]] || die "$name is not set: set it in launch/settings.sh or in the environment"
  done
}

need_run_name() {
  [[ $RUN_NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    die "RUN_NAME='$RUN_NAME' is not valid: use lower-case letters, digits and dashes, a letter first"
}

need_python() {
  type -P python > /dev/null || die "there is no python on PATH: activate the environment that has maskgen"
}

need_bucket() {
  [[ $WORKDIR == gs://?* ]] || die "WORKDIR='$WORKDIR' is not visible to all hosts: give gs://BUCKET/FOLDER"
}

# Prints words in shell syntax, quoted where necessary.
quote() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[-A-Za-z0-9_./:=@%+,]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s\n' "${line:1}"
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ $DRY_RUN == yes ]]; then
    quote "$@"
  else
    "$@"
  fi
}
