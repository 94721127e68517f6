"""Whether a compiled program fits the device, told before it runs; and memory that steps on a CPU use again."""

import ctypes
import os
from collections.abc import Mapping

import jax

from tosa_jax.errors import DeviceError

_GIB = 2**30


def needed_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program takes on each device: arguments, results and temporaries, by XLA's analysis."""
    stats = compiled.memory_analysis()
    if stats is None:  # a backend that does not say
        return 0
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return held + stats.temp_size_in_bytes


def device_bytes(device: jax.Device) -> int:
    """Memory of a device in bytes."""
    return limit_of(device.memory_stats())


def limit_of(stats: Mapping[str, int] | None) -> int:
    """What an allocator with these statistics may take, or the machine's own memory where it sets no limit."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (stats or {}).get("bytes_limit", machine)


def check_fits(
    compiled: jax.stages.Compiled, what: str, advice: str, device: jax.Device | None = None
) -> None:
    """Raise a DeviceError, with both numbers and `advice`, if the program called `what` is too large."""
    device = device or jax.local_devices()[0]
    needed, limit = needed_bytes(compiled), device_bytes(device)
    if needed > limit:
        raise DeviceError(
            f"{what} needs {needed / _GIB:.1f} GiB by XLA's memory analysis, and a device "
            f"({device.device_kind}) has {limit / _GIB:.1f} GiB: {advice}"
        )


_MALLOPT = {
    -8: 1,  # M_ARENA_MAX: the arenas of other threads cannot hold pieces above 64 MB
    -4: 0,  # M_MMAP_MAX: no piece is mapped, and unmapped, on its own
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: what is free at the end stays
}


def keep_freed_memory() -> None:
    """Lets glibc keep what programs on a CPU free, for their next call; to be called before the first one.

    XLA asks for a program's temporaries anew at each call, and glibc by default gives large pieces back to the system,
    so that every page of them faults again. The process then stays as large as it ever was. Nothing is done where JAX
    runs on an accelerator, the C library is another, or the environment tunes it already (`MALLOC_*`,
    `GLIBC_TUNABLES`).
    """
    tuned = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and jax.default_backend() == "cpu" and not tuned:
        for option, value in _MALLOPT.items():
            mallopt(option, value)
