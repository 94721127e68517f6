"""Peak speed and memory of accelerators, by JAX's `device_kind`. Utilisation and memory checks use them.

The figures are the makers': dense bfloat16 matrix products without sparsity, nominal memory. A device that is not in
the table is unknown.
"""

import glob
import importlib.metadata
import importlib.util
import math
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flax
import jax

from tosa_jax.errors import ConfigError

if TYPE_CHECKING:
    # To type checkers, `jax.Device` is a variable and no class.
    from jaxlib._jax import Device as Device
else:
    Device = jax.Device


@dataclass(frozen=True)
class Accelerator:
    """Peak figures of one JAX device.

    peak_flops   bfloat16 floating-point operations a second; a multiply-add is two.
    memory       bytes.
    memory_rate  bytes a second between memory and chip.
    link_rate    bytes a second to its neighbours, both directions of all links together.
    source       page with the figures.
    """

    name: str
    peak_flops: float
    memory: int
    memory_rate: float
    link_rate: float
    source: str


_TPU = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
_GB, _GIB = 10**9, 2**30

ACCELERATORS: tuple[tuple[str, Accelerator], ...] = tuple(
    (pattern, Accelerator(name, peak * 1e12, memory, rate * 1e9, link * 1e9, source))
    for pattern, name, peak, memory, rate, link, source in (
        (r"TPU v4$", "TPU v4", 275, 32 * _GIB, 1200, 300, _TPU + "v4"),
        (r"TPU v5( lite|e)$", "TPU v5e", 197, 16 * _GIB, 819, 400, _TPU + "v5e"),
        (r"TPU v5p?$", "TPU v5p", 459, 95 * _GIB, 2765, 1200, _TPU + "v5p"),
        (r"TPU v6( lite|e)$", "TPU v6e", 918, 32 * _GIB, 1638, 800, _TPU + "v6e"),
        (r"A100.*40GB", "A100 40 GB", 312, 40 * _GB, 1555, 600, _NVIDIA + "a100"),
        (r"A100.*80GB", "A100 80 GB", 312, 80 * _GB, 1935, 600, _NVIDIA + "a100"),
        (r"H100 PCIe", "H100 PCIe", 756, 80 * _GB, 2000, 600, _NVIDIA + "h100"),
        (r"H100 NVL", "H100 NVL", 835, 94 * _GB, 3900, 600, _NVIDIA + "h100"),
        (r"H100.*80GB", "H100", 989, 80 * _GB, 3350, 900, _NVIDIA + "h100"),
        (r"H200 NVL", "H200 NVL", 835, 141 * _GB, 4800, 900, _NVIDIA + "h200"),
        (r"H200", "H200", 989, 141 * _GB, 4800, 900, _NVIDIA + "h200"),
    )
)
"""Pairs (regular expression, figures). The first expression that is found in `device_kind` counts."""


def accelerator(device_kind: str) -> Accelerator | None:
    """The figures of a device kind; None if it is not in the table."""
    return next((known for pattern, known in ACCELERATORS if re.search(pattern, device_kind)), None)


def peak_flops(devices: Sequence[Device]) -> float:
    """Sum of the devices' peak operations a second; NaN if one of them is unknown."""
    known = [accelerator(device.device_kind) for device in devices]
    return sum(math.nan if one is None else one.peak_flops for one in known)


def describe_device() -> str:
    """Number and kind of all devices, for example "8 x TPU v4"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def computes_in(dtype: Any, device: Device | None = None) -> bool:
    """Whether a device, by default the first one, multiplies matrices of a type: a CPU has no float16."""
    return str(dtype) != "float16" or (device or jax.devices()[0]).platform != "cpu"


def check_dtype(field: str, dtype: Any, device: Device | None = None) -> None:
    """Raises ConfigError, which names the field, if a device cannot compute in a type."""
    if not computes_in(dtype, device):
        raise ConfigError(
            f"{field}='float16': a CPU does not multiply matrices of that type; set bfloat16 or float32"
        )


def versions() -> dict[str, str]:
    """Versions of Python, jax and flax, for result files."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
    }


TPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")
"""Device files of the TPUs of a machine."""


def has_only_cpus() -> bool:
    """Whether libtpu is installed on a machine that has no TPU, and no plugin for another accelerator.

    JAX would start libtpu all the same, and libtpu prints errors on standard error before JAX falls back to the CPU.
    """
    if importlib.util.find_spec("libtpu") is None or any(map(glob.glob, TPU_FILES)):
        return False
    plugins = importlib.util.find_spec(
        "jax_plugins"
    )  # a namespace: one package for each accelerator
    return plugins is None and not importlib.metadata.entry_points(group="jax_plugins")
