#!/usr/bin/env bash
# One machine with one NVIDIA GPU or several: makes .venv with the [cuda] extra if there is
# none, and runs igpo_jax.main on all of its GPUs with the arguments that follow.
#
#     launch/gpu.sh [--dry-run] --config=configs/quickstart.py [--workdir=DIR] [--config.a.b=value]
#
# Started again with the same workdir, it continues from its last checkpoint.
set -euo pipefail

dry_run=0
case ${1:-} in
  -h | --help)
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
    exit 0
    ;;
  --dry-run)
    dry_run=1
    shift
    ;;
esac
case " $* " in
  *" --config"*) ;;
  *)
    echo "error: no --config: what should be run? (see --help)" >&2
    exit 2
    ;;
esac

run() {
  printf '+%s\n' "$(printf ' %q' "$@")"
  [ "$dry_run" = 1 ] || "$@"
}

cd "$(dirname "$0")/.."
if [ "$dry_run" = 1 ] || [ ! -x .venv/bin/python ]; then
  run python3 -m venv .venv
  run .venv/bin/pip install --quiet --editable '.[cuda]'
fi
run .venv/bin/python -m igpo_jax.main "$@"
