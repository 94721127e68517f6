#!/usr/bin/env bash
# A run on a GKE cluster of TPU slices, through xpk (pip install xpk).
#
#     launch/gke_xpk.sh ACTION --cluster=CLUSTER --zone=ZONE --project=ID --name=NAME [...] [-- ARGUMENTS]
#
#     run      --type=v5litepod-16 --image=IMAGE [--slices=1] [--restarts=10]: starts a workload that runs
#              `tosa_jax.main ARGUMENTS --multihost`. IMAGE needs Python and this project's extras tpu and gcs; this
#              checkout is added to it. A preempted slice starts again, and the run continues
#     status   lists the workloads of that name
#     delete   deletes the workload
#
# run needs ARGUMENTS with --config= and --workdir=gs://... DRY_RUN=1 prints the commands.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/remote.sh

action=${1:-}
case $action in
    run | status | delete) shift ;;
    *) usage "${action:+unknown action $action}" ;;
esac
cluster="" zone="" project="" name="" type="" image="" slices=1 restarts=10
parse "cluster zone project name type image slices restarts" "$@"
need cluster zone project name
check name '[a-z]([-a-z0-9]*[a-z0-9])?' "a name of lower-case letters, digits and dashes"
check zone '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone such as us-west4-a"
check slices '[1-9][0-9]*' "a positive number"
check restarts '[0-9]+' "a number"
if [[ $action == run ]]; then
    need type image
    check type '[a-z0-9]+-[0-9a-z]+' "a TPU type such as v5litepod-16"
    need_run gs:// "all hosts write to one bucket"
fi
need_command xpk

where=(--cluster="$cluster" --zone="$zone" --project="$project")
case $action in
    run)
        run xpk workload create "${where[@]}" --workload="$name" --tpu-type="$type" --num-slices="$slices" \
            --base-docker-image="$image" --script-dir=. --max-restarts="$restarts" \
            --termination-grace-period-seconds=300 \
            --command="python -m tosa_jax.main $(quoted "${rest[@]}") --multihost"
        ;;
    status) run xpk workload list "${where[@]}" --filter-by-job="$name" ;;
    delete) run xpk workload delete "${where[@]}" --workload="$name" ;;
esac
