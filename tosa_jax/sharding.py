"""Where arrays live: the mesh, one table from parameter paths to axes, and host batches made global.

Models never name the mesh. The batch is split over `data` and `fsdp` together; parameters over `fsdp` and `model`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tosa_jax.errors import ConfigError

AXES = ("data", "fsdp", "model")
BATCH = P(("data", "fsdp"))

RULES: tuple[tuple[str, P], ...] = (
    (r"(attn/qkv|mlp/fc1)/kernel$", P("fsdp", "model")),
    (r"(attn/qkv|mlp/fc1)/bias$", P("model")),
    (r"(attn/proj|mlp/fc2)/kernel$", P("model", "fsdp")),
    (r"(patch_embed/proj|head|head_dist)/kernel$", P("fsdp", None)),
)
"""First match wins; what no rule names is replicated. An axis that does not divide a dimension is left out."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1: all that are left."""

    data: int = -1
    fsdp: int = 1
    model: int = 1


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `model`. Raises ConfigError if the sizes do not fit the devices."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(
            f"mesh={sizes} (data, fsdp, model): sizes are positive, one of them may be -1"
        )
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if int(np.prod(sizes)) != len(devices):
        raise ConfigError(
            f"mesh={sizes} (data, fsdp, model) needs {int(np.prod(sizes))} devices, but there are "
            f"{len(devices)}; set --config.mesh.data=-1 to take all that are left"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on each device."""
    return NamedSharding(mesh, P())


def check_batch(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raise a ConfigError unless the mesh divides `batch_size`."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ConfigError(
            f"{name}={batch_size} is not divided by the mesh's data x fsdp = {ways} devices; "
            f"the nearest that is: {max(round(batch_size / ways), 1) * ways}"
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


def process_rows(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process's devices hold the i-th of n equal parts of a batch's rows.

    Processes that a `model` axis spans hold the same part. Raises ConfigError if a process's rows do not lie together.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
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
