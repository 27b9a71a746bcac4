#!/usr/bin/env bash
# Copies the results of a run from its workdir to this machine: metrics, samples, table,
# curves and the workers' logs. The TPU need not exist any more. Can be repeated.
#
#     launch/tpu/fetch.sh --project=P --zone=Z --name=N --workdir=gs://BUCKET/RUN [--to=DIR]
#
# --to=DIR       default: runs/NAME in this repository
# --checkpoints  the checkpoints, too (an 8B model's have tens of gigabytes)
# shellcheck source=launch/tpu/common.sh
source "$(dirname "$0")/common.sh"

to="" checkpoints=0
own_flag() {
  case $1 in
    --to=*) to=${1#*=} ;;
    --checkpoints) checkpoints=1 ;;
    *) return 1 ;;
  esac
}
parse "$@"
need_workdir
to=${to:-$root/runs/$IGPO_NAME}
flags=(--recursive)
[ "$checkpoints" = 1 ] || flags+=('--exclude=^checkpoints/.*')
run mkdir -p "$to"
run gcloud storage rsync "$IGPO_WORKDIR" "$to" "${flags[@]}" "--project=$IGPO_PROJECT"
