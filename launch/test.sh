#!/usr/bin/env bash
# Runs the tests on this machine, setting up .venv first if need be; arguments go to pytest.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
set_up "[test]"

if (($# == 0)); then set -- tests; fi
exec .venv/bin/python -m pytest "$@"
