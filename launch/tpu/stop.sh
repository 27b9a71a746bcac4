#!/usr/bin/env bash
# Ends the program on every worker: it saves a checkpoint first. The TPU stays, and costs.
# A resume.sh that watches the run sees that it was stopped, and ends too.
#
#     launch/tpu/stop.sh --project=P --zone=Z --name=N
# shellcheck source=launch/tpu/common.sh
source "$(dirname "$0")/common.sh"

parse "$@"
on_workers all "$(worker_sh stop)"
