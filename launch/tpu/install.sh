#!/usr/bin/env bash
# Puts this repository (the commit --ref, not what is uncommitted) and its packages on every
# worker, and the contents of --data, if given, into data/ there. Can be repeated.
#
#     launch/tpu/install.sh --project=P --zone=Z --name=N [--data=gs://BUCKET/DIR] [--ref=COMMIT]
# shellcheck source=launch/tpu/common.sh
source "$(dirname "$0")/common.sh"

parse "$@"
case $IGPO_DATA in
  "" | gs://?*) ;;
  *) die "IGPO_DATA=$IGPO_DATA does not begin with gs://" ;;
esac
if [ "$DRY_RUN" = 0 ]; then
  commit=$(git -C "$root" rev-parse --verify --quiet "$IGPO_REF^{commit}") ||
    die "IGPO_REF=$IGPO_REF: no such commit of a git clone at $root"
  say "installs commit $commit"
  [ -z "$(git -C "$root" status --porcelain)" ] || say "uncommitted changes stay here"
fi
archive=${TMPDIR:-/tmp}/igpo_jax-$IGPO_NAME.tar.gz
run git -C "$root" archive --format=tar.gz --prefix=igpo_jax/ "--output=$archive" "$IGPO_REF"
run gcloud compute tpus tpu-vm scp "$archive" "$IGPO_NAME:igpo_jax.tar.gz" "${where[@]}" --worker=all
install=$(worker_sh install ${IGPO_DATA:+"$IGPO_DATA"})
on_workers all "tar -xzf igpo_jax.tar.gz && $install"
