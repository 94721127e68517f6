"""How a kernel, which the compiler cannot look into, is divided over the devices of a mesh.

Each device works on what it has (`jax.shard_map`). Which axes of the mesh divide which axes of arrays is said by who
traces a program for a mesh (`over`); without that a kernel sees whole arrays, as on one device.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P


class _Division(NamedTuple):
    mesh: Mesh
    axes: Mapping[str, tuple[str, ...]]

    def spec(self, names: list[str], sizes: Mapping[str, int]) -> P:
        """The sharding of an array with these axes; what the mesh does not divide evenly stays whole."""

        def divides(name):
            ways = math.prod(self.mesh.shape[axis] for axis in self.axes.get(name, ()))
            return name in sizes and name in self.axes and sizes[name] % ways == 0

        return P(*(self.axes[name] if divides(name) else None for name in names))


_division: contextvars.ContextVar[_Division | None] = contextvars.ContextVar(
    "division", default=None
)


@contextlib.contextmanager
def over(mesh: Mesh, axes: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """Kernels that are traced in this context are divided over `mesh`.

    axes  the axes of the mesh that divide an axis of arrays, by its letter in the rules of `divide`.
    """
    token = _division.set(_Division(mesh, axes))
    try:
        yield
    finally:
        _division.reset(token)


def divide(call: Callable, rule: str, whole: tuple[str, ...]) -> Callable:
    """`call` for arrays that may be divided over a mesh.

    rule   the axes of the operands and results, a letter each, as "b q, b k -> b q". `whole` are those that no mesh
           divides: where an array comes divided along one, it is put together before.
    """
    operands, results = ([side.split() for side in sides.split(",")] for sides in rule.split("->"))

    def divided(*arrays):
        division = _division.get()
        if division is None or division.mesh.size == 1:
            return call(*arrays)
        sizes = {
            name: size
            for names, x in zip(operands, arrays, strict=True)
            for name, size in zip(names, x.shape, strict=True)
            if name not in whole
        }
        specs = [division.spec(names, sizes) for names in results]
        mapped = jax.shard_map(
            call,
            mesh=division.mesh,
            in_specs=tuple(division.spec(names, sizes) for names in operands),
            out_specs=tuple(specs) if len(specs) > 1 else specs[0],
            check_vma=False,
        )
        return mapped(*arrays)

    return divided
