#!/usr/bin/env bash
# One machine with one NVIDIA GPU or several: makes .venv if there is none, puts the [cuda] extra
# into it if that is missing, looks whether jax finds a GPU, and runs igpo_jax.main on all of them
# with the arguments that follow.
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
  --dry-run | --dry_run)
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
if [ ! -x .venv/bin/python ]; then
  run python3 -m venv .venv
fi
# README's first command makes .venv without it; everything would run on the CPU.
if ! compgen -G ".venv/lib/python*/site-packages/jax_cuda*_plugin" >/dev/null; then
  run .venv/bin/pip install --quiet --editable '.[cuda]'
fi
if [ "$dry_run" = 0 ] && ! .venv/bin/python -c 'import jax; jax.devices("gpu")' 2>/dev/null; then
  echo "error: jax finds no GPU here; does nvidia-smi show one, and its driver's version?" >&2
  exit 2
fi
run .venv/bin/python -m igpo_jax.main "$@"
