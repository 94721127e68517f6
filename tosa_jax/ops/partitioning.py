"""How a kernel, which the compiler cannot look into, is divided over the devices of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def divide(call: Callable, rule: str, whole: tuple[str, ...]) -> Callable:
    """`call` for arrays that are divided over a mesh: each device works on what it has.

    rule   the axes of the operands and results, a letter each, as "b q, b k -> b q". `whole` are those that no mesh
           divides: where an array comes divided along one, it is put together before.
    """
    operands, results = (side.split(",") for side in rule.split("->"))

    def partition(mesh: Mesh, arguments: Any, outputs: Any) -> tuple:
        def undivided(shapes, axes):
            leaves, tree = jax.tree.flatten(shapes)
            pairs = zip(leaves, axes, strict=True)
            return tree.unflatten([_undivided(mesh, x.sharding, names) for x, names in pairs])

        return mesh, call, undivided(outputs, results), undivided(arguments, operands)

    def _undivided(mesh, sharding, names):
        spec = dict(zip(names.split(), sharding.spec, strict=False))
        axes = (None if name in whole else spec.get(name) for name in names.split())
        return NamedSharding(mesh, P(*axes))

    divided = custom_partitioning(lambda *arrays: call(*arrays))
    in_order = tuple(sorted(set(whole), key=rule.index))  # the compiler wants them as they appear
    divided.def_partition(partition, sharding_rule=rule, need_replication_factors=in_order)
    return divided
