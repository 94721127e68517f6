# shellcheck shell=bash
# Sourced by the launch scripts for other machines. With DRY_RUN=1 every command is printed, none is run.

# Prints how to call the script that sources this, which is the comment at its top, and leaves with status 2.
usage() {
    if [[ -n "${1:-}" ]]; then echo "$(basename -- "$0"): $1" >&2; fi
    sed -n '2,/^[^#]/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$0" >&2
    exit 2
}

# The names of locals here must not be those of arguments, which they would hide.

# need NAME...: each names a variable that must have a value.
need() {
    local _key
    for _key in "$@"; do
        if [[ -z "${!_key:-}" ]]; then usage "--${_key//_/-} is missing"; fi
    done
}

# check NAME PATTERN MEANING: the variable's value matches, or is empty.
check() {
    if [[ -n "${!1:-}" && ! "${!1}" =~ ^($2)$ ]]; then usage "--${1//_/-}=${!1} is not $3"; fi
}

# parse "NAME..." ARGUMENT...: sets the variable of each --name=value; what follows -- goes to `rest`.
parse() {
    local _known=" $1 " _argument _key
    shift
    rest=()
    while (($#)); do
        _argument=$1
        shift
        if [[ $_argument == -- ]]; then
            rest=("$@")
            return
        fi
        if [[ ! $_argument =~ ^--([a-z-]+)=(.*)$ ]]; then usage "unexpected argument $_argument"; fi
        _key=${BASH_REMATCH[1]//-/_}
        if [[ $_known != *" $_key "* ]]; then usage "unknown argument --${BASH_REMATCH[1]}"; fi
        printf -v "$_key" %s "${BASH_REMATCH[2]}"
    done
}

# The arguments as one line that a shell reads back as they are.
quoted() {
    local _word _line="" _quote="'\\''"
    for _word in "$@"; do
        if [[ ! $_word =~ ^[a-zA-Z0-9_./:=,@%+-]+$ ]]; then _word="'${_word//\'/$_quote}'"; fi
        _line+=" $_word"
    done
    echo "${_line# }"
}

run_with() {
    local _how=$1
    shift
    if [[ "${DRY_RUN:-}" == 1 ]]; then
        quoted "$@"
    else
        echo "+ $(quoted "$@")" >&2
        $_how "$@"
    fi
}

run() {
    run_with "" "$@"
}

# As run, and the script ends with it: signals reach the command itself.
run_last() {
    run_with exec "$@"
}

need_command() {
    if [[ "${DRY_RUN:-}" != 1 ]] && ! command -v "$1" >/dev/null; then
        echo "$(basename -- "$0"): $1 is not installed" >&2
        exit 2
    fi
}

# Arguments of tosa_jax.main come after --, and what they must have here is checked before anything is made.
need_run() {
    if [[ " ${rest[*]:-}" != *" --config="* ]]; then
        usage "after --, arguments of tosa_jax.main are missing: at least --config=FILE"
    fi
    if [[ " ${rest[*]}" != *" --workdir=$1"* ]]; then
        usage "after --, --workdir=$1... is missing: $2"
    fi
}
