"""The device mesh, the sharding of parameters and batches on it, and global arrays from host batches.

A batch is split over the axes `dcn`, `data` and `fsdp` together. Parameters, their optimizer moments and their averages
are split over `fsdp` and `model`. Only gradients and scalars are therefore sent between slices.
"""

import contextlib
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tosa_jax.distributed.devices import Device
from tosa_jax.errors import ConfigError
from tosa_jax.ops import partitioning

AXES = ("dcn", "data", "fsdp", "model")
"""Axes of the mesh, those with the slowest links first."""

BATCH_AXES = ("dcn", "data", "fsdp")
"""Axes that a batch is split over."""

BATCH = P(BATCH_AXES)
"""Sharding of a batch: its first dimension is split, the others are not."""

RULES: tuple[tuple[str, P], ...] = (
    (r"(attn/(image_|meta_)?(qkv|q|kv)|mlp/fc1)/kernel$", P("fsdp", "model")),
    (r"(attn/(image_|meta_)?(qkv|q|kv)|mlp/fc1)/bias$", P("model")),
    (r"(attn/(image_|meta_)?proj|mlp/fc2)/kernel$", P("model", "fsdp")),
    (r"(patch_embed/proj|head|head_dist)/kernel$", P("fsdp", None)),
)
"""Pairs (regular expression of a parameter path, sharding). The first match counts; other parameters are replicated.
An axis that does not divide its dimension is left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each axis. One of data, fsdp and model may be -1: all remaining devices.

    dcn    slices, connected by the data centre's network; 0: as many as the devices report. Devices that report no
           slice, such as GPUs, can be split into any number of equal parts, in the order of the processes.
    data   copies of the parameters within a slice.
    fsdp   devices that share one copy of the parameters and split the batch.
    model  devices that split the matrices of a layer (tensor parallelism).
    """

    dcn: int = 0
    data: int = -1
    fsdp: int = 1
    model: int = 1


def make_mesh(config: MeshConfig, devices: list[Device] | None = None) -> Mesh:
    """A mesh with the axes `dcn`, `data`, `fsdp`, `model`. Raises ConfigError if the sizes do not fit the devices.

    Devices are ordered by slice, then by process. Each process then holds consecutive rows of a batch, and a batch is
    the same for any number of processes.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=_place)
    on_slices = Counter(_slice(device) for device in devices)
    on_processes = Counter(device.process_index for device in devices)
    sizes = mesh_sizes(config, list(on_processes.values()), slices=len(on_slices))
    grid = np.asarray(devices).reshape([sizes[axis] for axis in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(config: MeshConfig, local_devices: list[int], slices: int = 1) -> dict[str, int]:
    """Number of devices along each of AXES, by name. Raises ConfigError if they do not fit the devices.

    local_devices  number of devices of each process.
    slices         number of slices that the devices report.
    """
    count = sum(local_devices)
    sizes = dataclasses.asdict(config) | {"dcn": config.dcn or slices}
    named = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)
    rest = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(rest) > 1 or "dcn" in rest or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(
            f"mesh: {named}: sizes are positive, one of data, fsdp and model may be -1"
        )
    sizes |= dict.fromkeys(rest, max(count // known, 1))
    needed = math.prod(sizes.values())
    if needed != count:
        raise ConfigError(
            f"mesh: {named} needs {needed} devices, but there are {count}; set "
            "--config.mesh.data=-1 to take all that are left"
        )
    if slices not in (1, sizes["dcn"]):
        raise ConfigError(
            f"mesh: dcn={sizes['dcn']}, but the devices are on {slices} slices: use 0"
        )
    if any(local % sizes["model"] for local in local_devices):
        raise ConfigError(
            f"mesh: model={sizes['model']} does not divide the {min(local_devices)} devices of a process, "
            "which reads rows of the batch for itself; use fsdp for more"
        )
    return sizes


def _slice(device: Device) -> int:
    return getattr(device, "slice_index", None) or 0


def _place(device: Device) -> tuple[int, int, int]:
    return _slice(device), device.process_index, device.id


def kernels_over(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """Kernels of programs that are traced in this context are divided over the mesh: examples, and heads."""
    return partitioning.over(mesh, {"b": BATCH_AXES, "h": ("model",)})


def batch_ways(mesh: Mesh) -> int:
    """Number of parts that a batch is split into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: rows over `dcn`, `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array with a copy on each device."""
    return NamedSharding(mesh, P())


def check_batch(name: str, batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises ConfigError unless the mesh splits each of the `accumulate` parts of `batch_size` evenly."""
    ways = batch_ways(mesh)
    if batch_size % (ways * accumulate):
        parts = f" x accumulate = {ways * accumulate}" if accumulate > 1 else f" = {ways} devices"
        raise ConfigError(
            f"{name}={batch_size} is not divided by the mesh's dcn x data x fsdp{parts}; the nearest "
            f"that is: {max(round(batch_size / ways / accumulate), 1) * ways * accumulate}"
        )


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Sharding of the parameter with this path and shape, by `RULES`."""
    for pattern, spec in RULES:
        if re.search(pattern, path) and len(spec) <= len(shape):
            fits = (
                axis if axis is not None and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(spec, shape, strict=False)
            )
            return P(*fits)
    return P()


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of a train state, one a leaf: optimizer moments and averages are sharded as their parameters.

    The last string key on the path to a leaf is the path of its parameter.
    """

    def one(key_path, leaf):
        names = [k.key for k in key_path if isinstance(k, jax.tree_util.DictKey)]
        path = next((n for n in reversed(names) if isinstance(n, str)), "")
        return NamedSharding(mesh, spec_for(path, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def gather_params(
    params: Mapping[str, jax.Array], mesh: Mesh, dtype: jax.typing.DTypeLike
) -> dict[str, jax.Array]:
    """Gathers parameters over `fsdp`; for use inside a jitted step.

    Parameters that are split over `fsdp` are cast to `dtype`, the dtype of the computation, and then gathered; their
    gradients are split again. Without these constraints XLA may move activations to the parts of a parameter instead.
    """

    def one(path, x):
        spec = spec_for(path, x.shape, mesh)
        if "fsdp" not in spec:
            return x
        whole = P(*(None if axis == "fsdp" else axis for axis in spec))
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)).astype(dtype)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, whole))

    return {path: one(path, x) for path, x in params.items()}


def process_rows(mesh: Mesh) -> tuple[int, int]:
    """(i, n): the devices of this process hold the i-th of n equal parts of a batch's rows.

    Processes along a `model` axis hold the same part. Raises ConfigError if a process's rows are not consecutive.
    """
    shards = batch_ways(mesh)
    parts = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
    rows = sorted({part[0].indices(shards)[0] for part in parts if part is not None})
    if rows != list(range(rows[0], rows[-1] + 1)) or rows[0] % len(rows) or shards % len(rows):
        raise ConfigError(
            f"mesh={tuple(mesh.shape.values())}: this process's devices hold the parts {rows} of a batch, which are "
            "not consecutive; let the axis model divide, or be divided by, the devices of a process"
        )
    return rows[0] // len(rows), shards // len(rows)


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays of this process's rows of a batch. Processes hold consecutive rows, in order."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def to_host(tree: Any) -> Any:
    """Gathers global arrays as NumPy arrays in every process. Every process must call this."""
    return multihost_utils.process_allgather(tree, tiled=True)
