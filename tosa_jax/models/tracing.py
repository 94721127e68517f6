"""Making modules while JAX traces: the keys of their initialisation, and modules that are shapes alone."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


class _Keys(nnx.RngStream):
    """The keys that `nnx.RngStream` gives, counted in Python.

    Its counter is an array. Under a trace each count is an operation more, and Flax compares its old and new sharding:
    JAX then looks through all operations so far for an error message that nobody reads. That was half of the time.
    """

    def __init__(self, key: jax.Array) -> None:
        super().__init__(key, tag="default")
        self.given = 0

    def __call__(self) -> jax.Array:
        self.given += 1
        return jax.random.fold_in(self.key[...], self.given - 1)


def rngs_of(key: jax.Array) -> nnx.Rngs:
    """`nnx.Rngs(key)`, whose keys take little time to trace. It is to be made inside the trace that uses it."""
    rngs: Any = nnx.Rngs()
    rngs.default = _Keys(key)
    return rngs


def abstract(make: Callable[[nnx.Rngs], Model]) -> Model:
    """The module that `make` returns, with shapes for arrays: nothing is drawn and nothing allocated."""
    return nnx.eval_shape(lambda: make(rngs_of(jax.random.key(0))))
