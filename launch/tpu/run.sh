#!/usr/bin/env bash
# Starts the program on every worker, in the background: it goes on when this ends. If it is
# running already, nothing happens. What follows "--" are the arguments of igpo_jax.main;
# --distributed and --workdir are added. Started again with the same workdir, it continues
# from its last checkpoint.
#
#     launch/tpu/run.sh --project=P --zone=Z --name=N --workdir=gs://BUCKET/RUN -- \
#         --config=configs/math500.py:data,v5e-64
# shellcheck source=launch/tpu/common.sh
source "$(dirname "$0")/common.sh"

parse "$@"
need_workdir
check_arguments ${REST[@]+"${REST[@]}"}
on_workers all "$(worker_sh start "$IGPO_WORKDIR" "${REST[@]}")"
