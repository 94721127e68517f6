#!/usr/bin/env bash
# A run on all GPUs of this machine. Makes .venv first if there is none. The packages bring CUDA; the driver must be
# installed.
#
#     launch/gpu.sh --config=configs/deit_s.py ...       arguments of tosa_jax.main
#
# CUDA_VISIBLE_DEVICES=0,1 takes some of them. DRY_RUN=1 prints the commands.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/remote.sh
source launch/setup.sh

if [[ " $*" != *" --config="* ]]; then usage "--config=FILE is missing"; fi
need_command nvidia-smi
run nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
# One process drives all GPUs of a machine.
run set_up "[cuda]"
run_last env JAX_PLATFORMS=cuda .venv/bin/python -m tosa_jax.main "$@"
