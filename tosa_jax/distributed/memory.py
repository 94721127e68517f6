"""Memory: checks that a compiled program fits its device before it runs, and settings for programs on a CPU."""

import ctypes
import os
from collections.abc import Mapping

import jax

from tosa_jax.distributed.devices import Device
from tosa_jax.errors import DeviceError

_GIB = 2**30


def needed_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program needs on each device for arguments, results and temporaries, by XLA; 0 if unknown."""
    stats = compiled.memory_analysis()
    if stats is None:  # this backend has no analysis
        return 0
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return held + stats.temp_size_in_bytes


def device_bytes(device: Device) -> int:
    """Memory of a device in bytes."""
    return limit_of(device.memory_stats())


def limit_of(stats: Mapping[str, int] | None) -> int:
    """The limit in bytes in an allocator's statistics; without one, the memory of this machine."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (stats or {}).get("bytes_limit", machine)


def check_fits(
    compiled: jax.stages.Compiled, what: str, advice: str, device: Device | None = None
) -> None:
    """Raises DeviceError if a program needs more memory than its device has.

    what    the program's name in the message, which gives both sizes.
    advice  what the user can change.
    device  None: the first local one.
    """
    where: Device = jax.local_devices()[0] if device is None else device
    needed, limit = needed_bytes(compiled), device_bytes(where)
    if needed > limit:
        raise DeviceError(
            f"{what} needs {needed / _GIB:.1f} GiB by XLA's memory analysis, and a device "
            f"({where.device_kind}) has {limit / _GIB:.1f} GiB: {advice}"
        )


_MALLOPT = {
    -8: 1,  # M_ARENA_MAX: one arena, because those of other threads hold no block above 64 MB
    -4: 0,  # M_MMAP_MAX: no block gets a memory mapping of its own
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: free memory at the end of the heap is kept
}


def keep_freed_memory() -> None:
    """Makes glibc keep the memory that programs on a CPU free. Call it before the first program runs.

    XLA allocates a program's temporaries anew at each call. By default glibc returns large blocks to the system, and
    then every page of them faults again at the next call. With these settings the process never shrinks. Nothing
    changes if JAX runs on an accelerator, if the C library is not glibc, or if the environment already tunes it
    (`MALLOC_*`, `GLIBC_TUNABLES`).
    """
    tuned = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and jax.default_backend() == "cpu" and not tuned:
        for option, value in _MALLOPT.items():
            mallopt(option, value)
