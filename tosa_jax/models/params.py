"""A model as a flat dict of parameters: `{"blocks/0/attn/qkv/kernel": array}`.

One path mapping for everything that goes by name: freezing, weight decay, sharding, checkpoints, released weights.
Paths are timm's names with slashes; what a layer kind adds to the network lies under `kinds/`.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx

Params = dict[str, Any]


def get_params(model: nnx.Module) -> Params:
    """The model's parameters by path, in a fixed order."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): variable.get_value() for path, variable in flat}


def nest(params: Mapping[str, Any]) -> dict[Any, Any]:
    """The flat dict as NNX nests it: one level a step of the path, list positions as ints."""
    nested: dict[Any, Any] = {}
    for path, value in params.items():
        *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        node = nested
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return nested


def set_params(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> Any:
    """The model of `graphdef` (from `split`) that holds `params`, which must be exactly its own."""
    return nnx.merge(graphdef, nest(params))


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Structure and parameters of a model; abstract models will do."""
    return nnx.split(model)[0], get_params(model)
