#!/usr/bin/env bash
# Runs the tests on this machine; arguments go to pytest. Makes .venv first if there is none.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
set_up "[test]"

# Each file of tests on one core, several files at a time.
if (($# == 0)); then set -- -n logical --maxprocesses=4 --dist=loadfile tests; fi
exec .venv/bin/python -m pytest "$@"
