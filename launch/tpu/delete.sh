#!/usr/bin/env bash
# Deletes the TPU and its place in the queue, whatever runs there, and looks that it is gone.
# The workdir stays.
#
#     launch/tpu/delete.sh --project=P --zone=Z --name=N
# shellcheck source=launch/tpu/common.sh
source "$(dirname "$0")/common.sh"

parse "$@"
if [ "$DRY_RUN" = 0 ] && [ "$(slice_state)" = absent ]; then
  say "there is no $IGPO_NAME in $IGPO_ZONE"
  exit 0
fi
if [ "$IGPO_DIRECT" = 1 ]; then
  run gcloud compute tpus tpu-vm delete "$IGPO_NAME" "${where[@]}" --quiet
else
  run gcloud compute tpus queued-resources delete "$IGPO_NAME" "${where[@]}" --force --quiet
fi
if [ "$DRY_RUN" = 0 ]; then
  state=$(slice_state)
  if [ "$state" != absent ]; then
    say "$IGPO_NAME is still there ($state) and may cost: look again with status.sh"
    exit 1
  fi
  say "$IGPO_NAME is gone"
fi
