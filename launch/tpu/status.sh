#!/usr/bin/env bash
# Says whether the TPU is there (and costs), and what the program does on each worker.
#
#     launch/tpu/status.sh --project=P --zone=Z --name=N
# shellcheck source=launch/tpu/common.sh
source "$(dirname "$0")/common.sh"

parse "$@"
if [ "$DRY_RUN" = 1 ]; then
  [ "$IGPO_DIRECT" = 1 ] || run gcloud compute tpus queued-resources describe "$IGPO_NAME" \
    "${where[@]}" "--format=value(state.state)"
  run gcloud compute tpus tpu-vm describe "$IGPO_NAME" "${where[@]}" "--format=value(state)"
  workers_state
  exit 0
fi
state=$(slice_state)
echo "$IGPO_NAME: $state"
if [ "$state" = up ]; then
  workers_state
fi
