#!/usr/bin/env bash
# Asks for a TPU: as a queued resource, or with --direct at once. It costs from the moment
# it is up until delete.sh.
#
#     launch/tpu/create.sh --project=P --zone=Z --name=N --slice=v5e-64 [--spot] [--wait]
#
# --wait  returns when the TPU is up (or will not be)
# shellcheck source=launch/tpu/common.sh
source "$(dirname "$0")/common.sh"

wait_for_it=0
own_flag() {
  [ "$1" = --wait ] && wait_for_it=1
}
parse "$@"
need_accelerator

flags=("--accelerator-type=$IGPO_ACCELERATOR")
[ "$IGPO_SPOT" = 0 ] || flags+=(--spot)
# shellcheck disable=SC2206  # several flags in one variable: splitting is what is wanted
[ -z "$IGPO_CREATE_FLAGS" ] || flags+=($IGPO_CREATE_FLAGS)

if [ "$IGPO_DIRECT" = 1 ]; then
  run gcloud compute tpus tpu-vm create "$IGPO_NAME" "${where[@]}" \
    "--version=$IGPO_RUNTIME" "${flags[@]}"
else
  run gcloud compute tpus queued-resources create "$IGPO_NAME" "${where[@]}" \
    "--node-id=$IGPO_NAME" "--runtime-version=$IGPO_RUNTIME" "${flags[@]}"
fi
if [ "$wait_for_it" = 0 ]; then
  exit 0
fi
if [ "$DRY_RUN" = 1 ]; then
  echo "# then, every $IGPO_POLL seconds until the TPU is READY:"
  [ "$IGPO_DIRECT" = 1 ] || run gcloud compute tpus queued-resources describe "$IGPO_NAME" \
    "${where[@]}" "--format=value(state.state)"
  run gcloud compute tpus tpu-vm describe "$IGPO_NAME" "${where[@]}" "--format=value(state)"
  exit 0
fi
while :; do
  state=$(slice_state)
  case $state in
    up)
      say "$IGPO_NAME is up"
      exit 0
      ;;
    waiting | unknown) say "$IGPO_NAME: $state" ;;
    *)
      say "$IGPO_NAME: $state; status.sh tells more, delete.sh clears it away"
      exit 1
      ;;
  esac
  sleep "$IGPO_POLL"
done
