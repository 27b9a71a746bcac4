#!/usr/bin/env bash
# Shows the end of the program's log on one worker.
#
#     launch/tpu/logs.sh --project=P --zone=Z --name=N [--worker=0] [--lines=100] [--follow]
#
# --worker=K  which worker, from 0, or "all"; progress is shown by worker 0 only
# --lines=N   how many lines
# --follow    goes on as the log grows, until interrupted
# shellcheck source=launch/tpu/common.sh
source "$(dirname "$0")/common.sh"

worker=0 lines=100 follow=""
own_flag() {
  case $1 in
    --worker=*) worker=${1#*=} ;;
    --lines=*) lines=${1#*=} ;;
    --follow) follow=" --follow=name --retry" ;;
    *) return 1 ;;
  esac
}
parse "$@"
case $lines in
  "" | *[!0-9]*) die "--lines=$lines is no number" ;;
esac
on_workers "$worker" "tail --lines=$lines$follow igpo_run/run.log"
