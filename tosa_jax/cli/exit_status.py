"""One line and an exit status for what a person did wrong; a defect of this project keeps its traceback."""

import os
import sys
import traceback
from collections.abc import Callable

from absl import flags, logging

from tosa_jax.distributed import coordination
from tosa_jax.errors import DeviceError, UserError


def guard(work: Callable[[], int]) -> int:
    """What `work` returns, or 2 and one line on standard error for what a person can mend.

    Of several processes one that fails ends the others.
    """
    # Grain asks absl for its flags, and warnings of libraries belong to standard error.
    flags.FLAGS.mark_as_parsed()
    logging.set_verbosity(logging.ERROR)
    try:
        status = work()
    except BaseException as error:
        mendable = error if isinstance(error, UserError) else _of_devices(error)
        if mendable is not None:
            print(f"error: {mendable}", file=sys.stderr)
            return coordination.end_all(2, str(mendable))
        if not coordination.are_several():
            raise
        sys.stderr.write(coordination.explain(error))
        return coordination.end_all(1, str(error) or type(error).__name__)
    coordination.part()
    return status


def _of_devices(error: BaseException) -> UserError | None:
    """What JAX says of devices, as one line; None for anything else, which is a defect."""
    if not isinstance(error, RuntimeError | AssertionError):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    # JAX only asserts that there is a backend where a platform of JAX_PLATFORMS has none at all.
    if frames and frames[-1].filename.endswith("xla_bridge.py"):
        asked = os.environ.get("JAX_PLATFORMS", "")
        return DeviceError(
            f"JAX finds no device of the kind asked for (JAX_PLATFORMS={asked!r} {error}): install tosa-jax[cuda] or "
            "tosa-jax[tpu], or set JAX_PLATFORMS=cpu"
        )
    if "RESOURCE_EXHAUSTED" in str(error):
        return DeviceError(
            f"the device's memory is full ({str(error)[:160]}): take a smaller batch size, model.map_chunk=64, or more "
            "devices along --config.mesh.fsdp"
        )
    return None
