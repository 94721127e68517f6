#!/usr/bin/env bash
# Runs the main job on this machine. Makes .venv first if there is none.
#
#     launch/local.sh                                    the offline default, configs/digits.py
#     launch/local.sh --config=configs/deit_s.py ...     these arguments instead of the default ones
#
# Relative paths are relative to the root of the repository.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
set_up ""

if (($# == 0)); then set -- --config=configs/digits.py; fi
exec .venv/bin/python -m tosa_jax.main "$@"
