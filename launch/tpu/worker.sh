#!/usr/bin/env bash
# Runs on a worker of a TPU; install.sh brings it there and the others call it by ssh.
#
#     worker.sh install [gs://DATA]     a virtual environment with the package; data/
#     worker.sh start WORKDIR ARG...    igpo_jax.main in the background; log in ~/igpo_run
#     worker.sh state                   none, running, stopped, lost, or exit CODE
#     worker.sh stop                    SIGTERM, and waits until a checkpoint is saved
#
# --dry-run as the first argument prints what would be run, and runs nothing.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
state=$root/../igpo_run # beside the code: a new install leaves it alone
python=$root/.venv/bin/python

run() {
  printf '+%s\n' "$(printf ' %q' "$@")" >&2
  [ "$dry_run" = 1 ] || "$@"
}

alive() { # a recorded pid can be another program's after a restart of the machine
  [ -f "$state/pid" ] && grep -qs worker.sh "/proc/$(cat "$state/pid")/cmdline"
}

do_install() {
  cd "$root"
  # TPU images bring Python 3.10; uv finds or fetches the version that the tests run on.
  run python3 -m pip install --quiet --user uv
  [ -x "$python" ] || run python3 -m uv venv --quiet --seed --python 3.11 .venv
  run "$python" -m pip install --quiet --editable ".[tpu]"
  if [ $# -gt 0 ]; then
    run mkdir -p data
    run gcloud storage rsync --recursive "$1" data
  fi
}

do_start() {
  if alive; then
    echo "already running"
    return
  fi
  if [ "$dry_run" = 1 ]; then
    run "$python" -m igpo_jax.main --distributed "--workdir=$1" "${@:2}"
    return
  fi
  mkdir -p "$state"
  rm -f "$state/exit" "$state/stopped" "$state/program"
  # A session of its own, so that the end of the ssh connection does not reach it.
  setsid nohup bash "${BASH_SOURCE[0]}" attend "$@" >>"$state/run.log" 2>&1 </dev/null &
  echo $! >"$state/pid"
  echo "started"
}

do_attend() { # runs the program and keeps its exit code; its log goes to the workdir
  cd "$root"
  # Told to end, a shell would go at once: it has to outlive the program, which saves.
  trap : TERM
  local code=0
  echo "--- $(date -u +%FT%TZ) $(hostname): ${*:2}"
  "$python" -m igpo_jax.main --distributed "--workdir=$1" "${@:2}" &
  echo $! >"$state/program"
  wait $! || code=$?
  while kill -0 $! 2>/dev/null; do # a signal to this shell ended the wait, not the program
    code=0
    wait $! || code=$?
  done
  echo "--- $(date -u +%FT%TZ) exit $code"
  gcloud storage cp "$state/run.log" "$1/logs/$(hostname).log" || echo "log not copied"
  echo "$code" >"$state/exit.partial"
  mv "$state/exit.partial" "$state/exit"
}

do_state() {
  local word=none
  if alive; then
    word=running
  elif [ -f "$state/stopped" ]; then
    word=stopped
  elif [ -f "$state/exit" ]; then
    word="exit $(cat "$state/exit")"
  elif [ -f "$state/pid" ]; then
    word=lost # the machine went down under it
  fi
  echo "igpo-worker: $(hostname) $word"
}

do_stop() {
  if alive; then
    run touch "$state/stopped"
    while [ "$dry_run" = 0 ] && alive && [ ! -s "$state/program" ]; do sleep 0.1; done
    # The program itself, not its graders.
    run kill -TERM "$(cat "$state/program" 2>/dev/null)" || true # it may have ended just now
    while [ "$dry_run" = 0 ] && alive; do sleep 1; done
  fi
  do_state
}

dry_run=0
case ${1:-} in
  --dry-run | --dry_run)
    dry_run=1
    shift
    ;;
esac
case ${1:-} in
  install | attend | start | state | stop)
    command=$1
    shift
    if [ "$command" = start ] && [ $# -lt 2 ]; then
      echo "error: worker.sh start WORKDIR ARG..." >&2
      exit 2
    fi
    "do_$command" "$@"
    ;;
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0" ;;
  *)
    echo "error: worker.sh install, start, state or stop (see --help)" >&2
    exit 2
    ;;
esac
