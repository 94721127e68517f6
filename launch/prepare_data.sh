#!/usr/bin/env bash
# Prepares a data set on this machine and copies it into a bucket, from which all hosts read it.
#
#     launch/prepare_data.sh --to=gs://BUCKET/PATH [--staging=DIR] -- --config=configs/deit_s.py [ARGUMENTS]
#
# ARGUMENTS are those of tosa_jax.prepare, e.g. --config.data.source_dir=DIR. The set is prepared in --staging
# (~/tensorflow_datasets), and everything there is copied. After an interruption, run the same command again. Runs
# then need --config.data.data_dir=gs://BUCKET/PATH. DRY_RUN=1 prints the commands.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/remote.sh
source launch/setup.sh

to="" staging=$HOME/tensorflow_datasets
parse "to staging" "$@"
need to staging
check to 'gs://[^/]+.*' "a place in a bucket, gs://BUCKET/PATH"
if [[ " ${rest[*]:-}" != *" --config="* ]]; then usage "after --, --config=FILE is missing"; fi
if [[ " ${rest[*]}" == *" --config.data.data_dir="* ]]; then usage "--staging says where data goes first"; fi
need_command gcloud

run set_up ""
run .venv/bin/python -m tosa_jax.prepare "${rest[@]}" --config.data.data_dir="$staging"
# Copies finished files alone, so that no reader sees a part of one.
run gcloud storage rsync --recursive --exclude='.*\.incomplete.*' "$staging" "$to"
