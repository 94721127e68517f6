"""Where arrays live: the mesh, one table from parameter paths to axes, and host batches made global.

Models never name the mesh. The batch is split over `dcn`, `data` and `fsdp` together; parameters, their moments and
their averages over `fsdp` and `model`, so that between slices nothing but gradients and scalars travels.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tosa_jax.errors import ConfigError

AXES = ("dcn", "data", "fsdp", "model")
"""Axes of the mesh, the slowest links first."""

BATCH_AXES = ("dcn", "data", "fsdp")
"""Those that a batch is split over."""

BATCH = P(BATCH_AXES)
"""How a batch lies: its rows are split, nothing else."""

RULES: tuple[tuple[str, P], ...] = (
    (r"(attn/qkv|mlp/fc1)/kernel$", P("fsdp", "model")),
    (r"(attn/qkv|mlp/fc1)/bias$", P("model")),
    (r"(attn/proj|mlp/fc2)/kernel$", P("model", "fsdp")),
    (r"(patch_embed/proj|head|head_dist)/kernel$", P("fsdp", None)),
)
"""First match wins; what no rule names is replicated. An axis that does not divide a dimension is left out."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one of data, fsdp and model may be -1: all that are left.

    dcn  slices, which the data centre's network joins; 0: as many as the devices say that they are on. On devices that
         know of no slices, such as GPUs, any number of equal parts, in the order of the processes.
    """

    dcn: int = 0
    data: int = -1
    fsdp: int = 1
    model: int = 1


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `dcn`, `data`, `fsdp`, `model`. Raises ConfigError if the sizes do not fit the devices.

    Devices stand in the order of their slices, then of their processes: each process holds the rows of a batch that
    it reads, one after the other, so that a batch does not depend on how many processes read it.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=_place)
    on_slices = Counter(_slice(device) for device in devices)
    on_processes = Counter(device.process_index for device in devices)
    sizes = mesh_sizes(config, list(on_processes.values()), slices=len(on_slices))
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(config: MeshConfig, local_devices: list[int], slices: int = 1) -> list[int]:
    """Devices along each of AXES, given those of each process. Raises ConfigError if they do not fit."""
    count = sum(local_devices)
    sizes = [config.dcn or slices, config.data, config.fsdp, config.model]
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes) or sizes[0] < 1:
        raise ConfigError(
            f"mesh: {named}: sizes are positive, one of data, fsdp and model may be -1"
        )
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(count // known, 1)
    if int(np.prod(sizes)) != count:
        raise ConfigError(
            f"mesh: {named} needs {int(np.prod(sizes))} devices, but there are {count}; set "
            "--config.mesh.data=-1 to take all that are left"
        )
    if slices not in (1, sizes[0]):
        raise ConfigError(f"mesh: dcn={sizes[0]}, but the devices are on {slices} slices: use 0")
    if any(local % sizes[-1] for local in local_devices):
        raise ConfigError(
            f"mesh: model={sizes[-1]} does not divide the {min(local_devices)} devices of a process, "
            "which reads rows of the batch for itself; use fsdp for more"
        )
    return sizes


def _slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", None) or 0


def _place(device: jax.Device) -> tuple[int, int, int]:
    return _slice(device), device.process_index, device.id


def batch_ways(mesh: Mesh) -> int:
    """Parts that a batch is split into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `dcn`, `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on each device."""
    return NamedSharding(mesh, P())


def check_batch(name: str, batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raise a ConfigError unless the mesh divides each of the `accumulate` parts of `batch_size`."""
    ways = batch_ways(mesh)
    if batch_size % (ways * accumulate):
        parts = f" x accumulate = {ways * accumulate}" if accumulate > 1 else f" = {ways} devices"
        raise ConfigError(
            f"{name}={batch_size} is not divided by the mesh's dcn x data x fsdp{parts}; the nearest "
            f"that is: {max(round(batch_size / ways / accumulate), 1) * ways * accumulate}"
        )


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The axes of a parameter of this path and shape."""
    for pattern, spec in RULES:
        if re.search(pattern, path) and len(spec) <= len(shape):
            fits = (
                axis if axis is not None and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(spec, shape, strict=False)
            )
            return P(*fits)
    return P()


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for each leaf of a train state: optimizer moments and averages live with their parameters.

    A leaf belongs to the parameter whose path is the last string key on the way to it.
    """

    def one(key_path, leaf):
        names = [k.key for k in key_path if isinstance(k, jax.tree_util.DictKey)]
        path = next((n for n in reversed(names) if isinstance(n, str)), "")
        return NamedSharding(mesh, spec_for(path, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def gather_params(
    params: Mapping[str, jax.Array], mesh: Mesh, dtype: jax.typing.DTypeLike
) -> dict[str, jax.Array]:
    """Inside a step: parameters as the layers compute with them, no longer split over `fsdp`.

    Matrices travel in `dtype`, that of the computation. All is said explicitly, because XLA may else move activations
    to where a parameter's parts are; the gradient of what was split comes back split.
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
    """(i, n): this process's devices hold the i-th of n equal parts of a batch's rows.

    Processes that a `model` axis spans hold the same part. Raises ConfigError if a process's rows do not lie together.
    """
    shards = batch_ways(mesh)
    parts = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
    rows = sorted({part[0].indices(shards)[0] for part in parts})
    if rows != list(range(rows[0], rows[-1] + 1)) or rows[0] % len(rows) or shards % len(rows):
        raise ConfigError(
            f"mesh={tuple(mesh.shape.values())}: this process's devices hold the parts {rows} of a batch, which do "
            "not lie together; let the axis model divide, or be divided by, the devices of a process"
        )
    return rows[0] // len(rows), shards // len(rows)


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays; processes hold contiguous rows in order."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def to_host(tree: Any) -> Any:
    """Whole arrays as NumPy ones, on every process; all of them call this."""
    return multihost_utils.process_allgather(tree, tiled=True)
