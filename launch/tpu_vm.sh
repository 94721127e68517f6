#!/usr/bin/env bash
# A run on Cloud TPU VMs, one host or many.
#
#     launch/tpu_vm.sh ACTION --name=NAME --zone=ZONE [--project=ID] [--type=v5litepod-16] [...] [-- ARGUMENTS]
#
#     up       create, wait, install and run; begins again whenever the TPU was preempted
#     create   requests the TPU as a queued resource: [--spot=1] or [--reserved=1], [--slices=2]
#     wait     waits until the TPU is ready
#     install  copies this checkout to all hosts and installs it
#     run      runs `tosa_jax.main ARGUMENTS --multihost` on all hosts and shows the logs; run it again to continue
#     status   prints the state of the queued resource
#     delete   deletes the queued resource and its TPU
#
# create and up need --type and --version (runtime, e.g. v2-alpha-tpuv5-lite); run and up need ARGUMENTS with
# --config= and --workdir=gs://... DRY_RUN=1 prints the commands.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/remote.sh

action=${1:-}
case $action in
    up | create | wait | install | run | status | delete) shift ;;
    *) usage "${action:+unknown action $action}" ;;
esac
name="" zone="" project="" type="" version="" spot=0 reserved=0 slices=1
parse "name zone project type version spot reserved slices" "$@"
need name zone
check name '[a-z]([-a-z0-9]*[a-z0-9])?' "a name of lower-case letters, digits and dashes"
check zone '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone such as us-west4-a"
check slices '[1-9][0-9]*' "a positive number"
check spot '0|1' "0 or 1"
check reserved '0|1' "0 or 1"
if [[ $action == up || $action == create ]]; then
    need type version
    check type 'v[0-9a-z]+-[0-9]+' "an accelerator type such as v5litepod-16"
    if ((spot && reserved)); then usage "--spot=1 and --reserved=1 exclude each other"; fi
fi
if [[ $action == up || $action == run ]]; then need_run gs:// "all hosts write to one bucket"; fi
need_command gcloud

where=(--zone="$zone")
if [[ -n $project ]]; then where+=(--project="$project"); fi
nodes=("$name")
if ((slices > 1)); then
    nodes=()
    for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

state() {
    gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format="value(state.state)" 2>/dev/null
}

create() {
    local node=(--node-id="$name")
    if ((slices > 1)); then node=(--node-count="$slices" --node-prefix="$name"); fi
    if ((spot)); then node+=(--spot); fi
    if ((reserved)); then node+=(--reserved); fi
    run gcloud compute tpus queued-resources create "$name" "${where[@]}" \
        --accelerator-type="$type" --runtime-version="$version" "${node[@]}"
}

# Waits until the TPU is ready; fails if the request has failed.
wait_until_there() {
    if [[ "${DRY_RUN:-}" == 1 ]]; then
        run gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format="value(state.state)"
        return
    fi
    local now
    while now=$(state); do
        case $now in
            ACTIVE) return ;;
            FAILED | SUSPENDING | SUSPENDED | DELETING)
                echo "tpu_vm.sh: $name is $now" >&2
                return 1
                ;;
        esac
        echo "tpu_vm.sh: $name is $now; waiting" >&2
        sleep "${POLL_SECONDS:-30}"
    done
    echo "tpu_vm.sh: there is no queued resource $name in $zone" >&2
    return 1
}

# on_all COMMAND: runs it in a shell on every host; slices run at the same time. Fails if one of them fails.
on_all() {
    local node pids=() pid failed=0
    for node in "${nodes[@]}"; do
        run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$1" &
        pids+=($!)
        if [[ "${DRY_RUN:-}" == 1 ]]; then wait "$!"; fi
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=$?; done
    return "$failed"
}

install() {
    local archive=/tmp/tosa_jax-$name.tar.gz node
    # Copies the files that git tracks, with local changes, and so no data, runs or environments.
    run bash -c "git ls-files -z | tar --null --files-from=- -czf $archive"
    for node in "${nodes[@]}"; do
        run gcloud compute tpus tpu-vm scp "$archive" "$node:$archive" "${where[@]}" --worker=all
    done
    # The images of TPU VMs have an older Python.
    local python="command -v python3.11 >/dev/null || { sudo apt-get -qq update && sudo apt-get -qq install python3.11-venv; }"
    on_all "mkdir -p tosa_jax && tar -xzf $archive -C tosa_jax && cd tosa_jax && { $python; } && launch/setup.sh '[tpu,gcs]'"
}

run_main() {
    on_all "cd tosa_jax && .venv/bin/python -m tosa_jax.main $(quoted "${rest[@]}") --multihost"
}

delete() {
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

# From the request to the report. A preempted TPU is requested again, and the run continues.
up() {
    local status
    while true; do
        if [[ "${DRY_RUN:-}" == 1 ]] || ! state >/dev/null; then create; fi
        wait_until_there
        install
        status=0
        run_main || status=$?
        if ((status == 0)) || [[ "$(state || true)" == ACTIVE ]]; then return "$status"; fi
        echo "tpu_vm.sh: $name was preempted; asking for it again" >&2
        delete
    done
}

case $action in
    up) up ;;
    create) create ;;
    wait) wait_until_there ;;
    install) install ;;
    run) run_main ;;
    status) run gcloud compute tpus queued-resources describe "$name" "${where[@]}" ;;
    delete) delete ;;
esac
