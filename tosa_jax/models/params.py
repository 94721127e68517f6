"""A model's parameters as a flat dict by path: `{"blocks/0/attn/qkv/kernel": array}`.

Freezing, weight decay, sharding, checkpoints and released weights all use these paths. They are timm's names with
slashes for dots; parameters that a layer kind adds to the network lie under `kinds/<layer>/`.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from flax import nnx

Params = dict[str, Any]
Model = TypeVar("Model", bound=nnx.Module)


def get_params(model: nnx.Module) -> Params:
    """The model's parameters by path, in a fixed order."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): variable.get_value() for path, variable in flat}


def nest(params: Mapping[str, Any]) -> dict[Any, Any]:
    """The flat dict nested as NNX nests it: one level for each part of the path, with ints for places in lists."""
    nested: dict[Any, Any] = {}
    for path, value in params.items():
        *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        node = nested
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return nested


def set_params(graphdef: nnx.GraphDef[Model], params: Mapping[str, Any]) -> Model:
    """The model of `graphdef` (from `split`) with these parameters: all of its own, and no others."""
    return nnx.merge(graphdef, nest(params))


def split(model: Model) -> tuple[nnx.GraphDef[Model], Params]:
    """Structure and parameters of a model; it may be abstract (shapes for arrays)."""
    return nnx.split(model)[0], get_params(model)
