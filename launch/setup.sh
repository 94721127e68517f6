#!/usr/bin/env bash
# Makes .venv and installs this project into it, once.
#
#     launch/setup.sh [EXTRAS]           EXTRAS as in pyproject.toml, e.g. '[tpu,gcs]'
#
# The other launch scripts source it, from the root of the repository, and call `set_up EXTRAS`.
# PYTHON=... names the interpreter to make .venv with.

complain() {
    echo "launch: $*" >&2
    exit 2
}

# Prints the first suitable Python, or says what is missing.
find_python() {
    local candidates=(python3.13 python3.12 python3.11 python3) candidate found=""
    if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        # Run it: a version manager may put a name on the path that only prints an error.
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
            2>/dev/null || continue
        found=${found:-$candidate}
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    if [[ -z "$found" ]]; then
        complain "no Python from 3.11 to 3.13 among: ${candidates[*]}; install one or set PYTHON="
    fi
    complain "$found cannot make virtual environments; on Debian and Ubuntu install its -venv" \
        "package (apt-get install python3-venv), elsewhere set PYTHON= to another one"
}

# The packages asked for, and the place: an environment does not survive a move.
stamp_of() {
    { echo "$1 $PWD" && cat pyproject.toml constraints.txt; } | cksum
}

set_up() {
    local extras=$1 stamp=.venv/tosa_jax_stamp python installed="" pins=(-c constraints.txt)
    if [[ -f $stamp ]]; then installed=$(<"$stamp"); fi
    # The environment of the tests holds everything that a run needs.
    if [[ -x .venv/bin/python ]] &&
        [[ $installed == "$(stamp_of "$extras")" || $installed == "$(stamp_of "[test]")" ]]; then
        return
    fi
    rm -f "$stamp"
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        # A link to a Python that is gone stops venv from making a new one.
        if [[ ! -x .venv/bin/python ]]; then rm -rf .venv; fi
        echo "launch: making .venv with $python" >&2
        "$python" -m venv .venv
    fi
    echo "launch: installing into .venv, once" >&2
    # The pins hold a jax that compiles badly for CUDA: see pyproject.toml.
    if [[ $extras == *cuda* ]]; then pins=(); fi
    # Python compiles a module when it is first imported. Most of those installed here never are.
    .venv/bin/python -m pip install --disable-pip-version-check --no-compile "${pins[@]}" \
        -e ".$extras" >&2
    # Last, so that a failed install is repeated.
    stamp_of "$extras" >"$stamp"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    CDPATH='' cd -- "$(dirname -- "$0")/.."
    set_up "${1:-}"
fi
