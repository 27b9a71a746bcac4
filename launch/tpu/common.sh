# shellcheck shell=bash
# What the scripts of this folder share: their settings, their flags, and how a command is
# run or only shown. Sourced, never run; works with bash 3.2 (macOS) and later.
set -euo pipefail
export CLOUDSDK_CORE_DISABLE_PROMPTS=1 # nothing is ever asked

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034  # for those who source this
root=$(cd "$here/../.." && pwd)

# One setting a line, from the environment; parse() lets flags of the same name win.
export IGPO_PROJECT=${IGPO_PROJECT:-} IGPO_ZONE=${IGPO_ZONE:-} IGPO_NAME=${IGPO_NAME:-}
export IGPO_SLICE=${IGPO_SLICE:-} IGPO_ACCELERATOR=${IGPO_ACCELERATOR:-}
export IGPO_RUNTIME=${IGPO_RUNTIME:-} IGPO_WORKDIR=${IGPO_WORKDIR:-} IGPO_DATA=${IGPO_DATA:-}
export IGPO_SPOT=${IGPO_SPOT:-0} IGPO_DIRECT=${IGPO_DIRECT:-0} IGPO_REF=${IGPO_REF:-HEAD}
export IGPO_CREATE_FLAGS=${IGPO_CREATE_FLAGS:-} IGPO_POLL=${IGPO_POLL:-60}
DRY_RUN=0
REST=() # what follows "--"

settings_help() {
  cat <<'HELP'

Settings, each an environment variable or a flag (the flag wins):
  IGPO_PROJECT      --project=ID       Google Cloud project
  IGPO_ZONE         --zone=ZONE        zone that has the accelerator
  IGPO_NAME         --name=NAME        of the TPU, and of its queued resource
  IGPO_SLICE        --slice=SLICE      v5e-N (N chips), v6e-N (N chips), v5p-N or v4-N (N cores,
                                       two a chip): sets the next two
  IGPO_ACCELERATOR  --accelerator=A    accelerator type, such as v5litepod-64
  IGPO_RUNTIME      --runtime=R        software version, such as v2-alpha-tpuv5-lite
  IGPO_WORKDIR      --workdir=gs://... where the run writes; it outlives the TPU
  IGPO_DATA         --data=gs://...    copied to data/ on every worker; may be left out
  IGPO_SPOT=1       --spot             cheaper; may be pre-empted at any time
  IGPO_DIRECT=1     --direct           no queue: get the TPU now or fail
  IGPO_REF          --ref=COMMIT       what of this repository is installed; default HEAD
  IGPO_CREATE_FLAGS                    further flags for gcloud's create, separated by spaces
  IGPO_POLL         --poll=SECONDS     between two looks at a state; default 60
Every script: --help prints this, --dry-run prints the commands and runs none of them.
HELP
}

usage() { # the comment at the head of the script, then the settings
  awk 'NR > 1 { if (!/^#/ || /^# shellcheck/) exit; sub(/^# ?/, ""); print }' "$0"
  settings_help
}

die() { # a user's mistake: one line, exit 2
  echo "error: $*" >&2
  exit 2
}

say() { echo "$(basename "$0" .sh): $*" >&2; }

# A script with flags of its own redefines this; false means the flag is unknown.
own_flag() { false; }

parse() {
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --dry-run | --dry_run) DRY_RUN=1 ;;
      --project=*) IGPO_PROJECT=${1#*=} ;;
      --zone=*) IGPO_ZONE=${1#*=} ;;
      --name=*) IGPO_NAME=${1#*=} ;;
      --slice=*) IGPO_SLICE=${1#*=} ;;
      --accelerator=*) IGPO_ACCELERATOR=${1#*=} ;;
      --runtime=*) IGPO_RUNTIME=${1#*=} ;;
      --workdir=*) IGPO_WORKDIR=${1#*=} ;;
      --data=*) IGPO_DATA=${1#*=} ;;
      --spot) IGPO_SPOT=1 ;;
      --direct) IGPO_DIRECT=1 ;;
      --ref=*) IGPO_REF=${1#*=} ;;
      --poll=*) IGPO_POLL=${1#*=} ;;
      --)
        shift
        REST=("$@")
        break
        ;;
      *) own_flag "$1" || die "unknown argument $1 (see --help)" ;;
    esac
    shift
  done
  need IGPO_PROJECT --project "the Google Cloud project"
  need IGPO_ZONE --zone "the zone"
  need IGPO_NAME --name "the name of the TPU"
  if [ "$DRY_RUN" = 0 ] && ! command -v gcloud >/dev/null; then
    die "gcloud is not installed; install the Google Cloud CLI, or look with --dry-run"
  fi
  where=("--zone=$IGPO_ZONE" "--project=$IGPO_PROJECT")
}

need() { # need VARIABLE FLAG MEANING
  [ -n "${!1}" ] || die "$1 is not set: give $2=..., $3 (see --help)"
}

need_accelerator() {
  case $IGPO_SLICE in
    v5e-[1-9]*) set -- "v5litepod-${IGPO_SLICE#v5e-}" v2-alpha-tpuv5-lite ;;
    v5p-[1-9]*) set -- "$IGPO_SLICE" v2-alpha-tpuv5 ;;
    v6e-[1-9]*) set -- "$IGPO_SLICE" v2-alpha-tpuv6e ;;
    v4-[1-9]*) set -- "$IGPO_SLICE" tpu-ubuntu2204-base ;;
    "") set -- "" "" ;;
    *) die "IGPO_SLICE=$IGPO_SLICE is none of v5e-N, v5p-N, v6e-N, v4-N; use --accelerator and --runtime" ;;
  esac
  IGPO_ACCELERATOR=${IGPO_ACCELERATOR:-$1}
  IGPO_RUNTIME=${IGPO_RUNTIME:-$2}
  need IGPO_ACCELERATOR --slice "such as v5e-64, or --accelerator"
  need IGPO_RUNTIME --runtime "the TPU software version"
}

need_workdir() {
  need IGPO_WORKDIR --workdir "where the run writes"
  case $IGPO_WORKDIR in
    gs://?*) ;;
    *) die "IGPO_WORKDIR=$IGPO_WORKDIR does not begin with gs://; a worker's disk is lost with the TPU" ;;
  esac
}

check_arguments() { # what follows "--": arguments of igpo_jax.main that are not ours to add
  local word config=0
  for word; do
    case $word in
      --config=* | --config) config=1 ;;
      --workdir*) die "give --workdir before the --, not after it" ;;
      --distributed*) die "--distributed is added for you" ;;
    esac
  done
  [ "$config" = 1 ] || die "no --config after the --: what should be run? (see --help)"
}

quote() { # one word, quoted for the shell where it has to be
  case $1 in
    "" | *[!A-Za-z0-9_./:=,@%+~-]*) printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf '%s' "$1" ;;
  esac
}

command_line() { # the words of a command, quoted so that they can be pasted
  local word line=""
  for word; do line="$line $(quote "$word")"; done
  printf '%s' "${line# }"
}

run() { # shows a command; then runs it, unless this is a dry run
  if [ "$DRY_RUN" = 1 ]; then
    echo "+ $(command_line "$@")"
  else
    echo "+ $(command_line "$@")" >&2
    "$@"
  fi
}

on_workers() { # on_workers WHICH COMMAND: runs a command line by ssh on worker WHICH ("all")
  run gcloud compute tpus tpu-vm ssh "$IGPO_NAME" "${where[@]}" "--worker=$1" \
    "--ssh-flag=-oConnectTimeout=30 -oServerAliveInterval=30" "--command=$2"
}

worker_sh() { # what on_workers is to run for worker.sh WORDS
  command_line bash igpo_jax/launch/tpu/worker.sh "$@"
}

workers_state() { # a line "igpo-worker: HOST STATE" of each; "none" before an installation
  on_workers all "if test -f igpo_jax/launch/tpu/worker.sh; then $(worker_sh state); \
else echo igpo-worker: \$(hostname) none; fi"
}

describe() { # describe COLLECTION FIELD: the value, ABSENT, or UNREACHABLE
  local value errors
  errors=$(mktemp)
  if value=$(gcloud compute tpus "$1" describe "$IGPO_NAME" "${where[@]}" "--format=value($2)" \
    2>"$errors"); then
    echo "$value"
  elif grep -q NOT_FOUND "$errors"; then
    echo ABSENT
  else
    cat "$errors" >&2
    echo UNREACHABLE
  fi
  rm -f "$errors"
}

slice_state() { # absent, waiting, up, gone, failed, or unknown where gcloud could not tell
  local queued=ACTIVE node
  [ "$IGPO_DIRECT" = 1 ] || queued=$(describe queued-resources state.state)
  case $queued in
    ACTIVE) ;; # the TPU itself decides
    ABSENT)
      echo absent
      return
      ;;
    FAILED)
      echo failed
      return
      ;;
    SUSPENDED)
      echo gone
      return
      ;;
    UNREACHABLE)
      echo unknown
      return
      ;;
    *)
      echo waiting
      return
      ;;
  esac
  node=$(describe tpu-vm state)
  case $node in
    READY) echo up ;;
    ABSENT) if [ "$IGPO_DIRECT" = 1 ]; then echo absent; else echo gone; fi ;;
    PREEMPTED | TERMINATED | STOPPED) echo gone ;;
    UNREACHABLE) echo unknown ;;
    *) echo waiting ;;
  esac
}

run_state() { # none, running, finished, mistake, stopped, interrupted, crashed, or unknown
  local lines states
  lines=$(workers_state 2>/dev/null) || {
    echo unknown
    return
  }
  states=$(printf '%s\n' "$lines" | sed -n 's/^igpo-worker: [^ ]* //p')
  has() { printf '%s\n' "$states" | grep -qx "$1"; }
  if [ -z "$states" ]; then
    echo unknown
  elif has running; then
    echo running
  elif has none; then
    echo none
  elif has stopped; then
    echo stopped
  elif has "exit 2"; then
    echo mistake
  elif [ "$(printf '%s\n' "$states" | sort -u)" = "exit 0" ]; then
    echo finished
  elif has "exit 143" || has lost; then
    echo interrupted
  else
    echo crashed
  fi
}
