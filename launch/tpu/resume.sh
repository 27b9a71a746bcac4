#!/usr/bin/env bash
# Sees a run through to its end: makes the TPU if there is none, installs, starts, watches;
# after a pre-emption makes it anew and goes on from the last checkpoint. Ends when the run
# is finished (0), was stopped by stop.sh (0), has a mistake in its arguments (2), or has
# crashed too often (1). May itself be interrupted and started again at any time.
#
#     launch/tpu/resume.sh --project=P --zone=Z --name=N --slice=v5e-64 --spot \
#         --workdir=gs://BUCKET/RUN [--data=gs://BUCKET/DIR] -- \
#         --config=configs/math500.py:data,v5e-64
#
# --delete-when-done  also deletes the TPU when the run has finished
# --max-crashes=N     gives up at the N-th crash on one TPU; default 3
# shellcheck source=launch/tpu/common.sh
source "$(dirname "$0")/common.sh"

delete_when_done=0 max_crashes=3
own_flag() {
  case $1 in
    --delete-when-done) delete_when_done=1 ;;
    --max-crashes=*) max_crashes=${1#*=} ;;
    *) return 1 ;;
  esac
}
parse "$@"
need_accelerator
need_workdir
check_arguments ${REST[@]+"${REST[@]}"}
case $max_crashes in
  "" | *[!0-9]*) die "--max-crashes=$max_crashes is no number" ;;
esac

install_and_start() { "$here/install.sh" "$@" && "$here/run.sh" "$@" -- "${REST[@]}"; }

if [ "$DRY_RUN" = 1 ]; then
  echo "# if there is no TPU:"
  "$here/create.sh" --dry-run --wait
  echo "# on a TPU that has no run yet:"
  install_and_start --dry-run
  echo "# every $IGPO_POLL seconds, until the run has ended:"
  "$here/status.sh" --dry-run
  echo "# if the TPU was pre-empted, and then again from the top:"
  "$here/delete.sh" --dry-run
  exit 0
fi

# The same code after a pre-emption as before it, whatever is committed here meanwhile.
IGPO_REF=$(git -C "$root" rev-parse --verify --quiet "$IGPO_REF^{commit}") ||
  die "IGPO_REF=$IGPO_REF: no such commit of a git clone at $root"

costs="$IGPO_NAME is still there and costs: delete.sh"
crashes=0 last=""
crashed() {
  crashes=$((crashes + 1))
  say "$1 ($crashes of $max_crashes)"
  if [ "$crashes" -ge "$max_crashes" ]; then
    "$here/logs.sh" --lines=40 || true # for the reader; the verdict stands without it
    say "gives up; $costs"
    exit 1
  fi
}

while :; do
  state=$(slice_state)
  [ "$state" != up ] || state=$(run_state)
  [ "$state" = "$last" ] || say "$IGPO_NAME: $state"
  last=$state
  case $state in
    absent)
      crashes=0
      "$here/create.sh" || say "could not be created; tries again"
      ;;
    waiting | unknown | running) ;;
    gone)
      say "pre-empted or ended by Google; makes it anew"
      "$here/delete.sh" || say "could not be deleted yet; tries again"
      ;;
    failed)
      gcloud compute tpus queued-resources describe "$IGPO_NAME" "${where[@]}" >&2 || true
      say "the request failed (see above); delete.sh clears it away"
      exit 1
      ;;
    none) install_and_start || crashed "could not be installed and started" ;;
    interrupted) "$here/run.sh" -- "${REST[@]}" || crashed "could not be started" ;;
    crashed)
      crashed "the program crashed"
      "$here/run.sh" -- "${REST[@]}" || crashed "could not be started"
      ;;
    mistake)
      "$here/logs.sh" --lines=5 || true # as above
      say "the program says that its arguments cannot work; $costs"
      exit 2
      ;;
    stopped)
      say "was stopped; $costs"
      exit 0
      ;;
    finished)
      say "finished: $IGPO_WORKDIR; fetch.sh brings it here"
      if [ "$delete_when_done" = 1 ]; then
        exec "$here/delete.sh"
      fi
      say "$costs"
      exit 0
      ;;
  esac
  sleep "$IGPO_POLL"
done
