"""Batch normalisation, and the running statistics that training measures for it.

Running statistics are parameters by path like any other (`models/params.py`), so that checkpoints, files of weights and
averages have them. No gradient moves them: a network returns their new values in `Output.running`, and the step takes
those after the optimizer's update.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tosa_jax.models.vit_config import ViTConfig

Running = dict[str, Array]
"""New values of running statistics, float32, by path below the module that returns them."""

MOMENTUM = 0.1
"""The share of a batch in the new running statistics: PyTorch's default."""

EPSILON = 1e-5
"""What is added to the variance: PyTorch's default."""


class RunningStatistic(nnx.Param):
    """A parameter that is measured and not trained."""


class BatchNorm(nnx.Module):
    """Normalises each channel over batch and grid (Ioffe and Szegedy 2015), as PyTorch's `BatchNorm2d`.

    In training by the mean and the variance of the whole batch, of all devices together; otherwise by the running ones.
    Statistics are float32 whatever the compute dtype.
    """

    def __init__(self, width: int, config: ViTConfig) -> None:
        self.dtype = config.dtype
        self.scale = nnx.Param(jnp.ones(width, config.param_dtype))
        self.bias = nnx.Param(jnp.zeros(width, config.param_dtype))
        self.running_mean = RunningStatistic(jnp.zeros(width, jnp.float32))
        self.running_var = RunningStatistic(jnp.ones(width, jnp.float32))

    def __call__(
        self, x: Float[Array, "b height width d"], *, train: bool
    ) -> tuple[Float[Array, "b height width d"], Running]:
        """x normalised, and with `train` the new running statistics; else {}."""
        wide, running = x.astype(jnp.float32), {}
        mean, variance = self.running_mean[...], self.running_var[...]
        if train:
            old = {"running_mean": mean, "running_var": variance}
            mean, variance = wide.mean(axis=(0, 1, 2)), wide.var(axis=(0, 1, 2))
            count = math.prod(x.shape[:3])
            seen = {"running_mean": mean, "running_var": variance * (count / max(count - 1, 1))}
            moved = {name: old[name] + MOMENTUM * (seen[name] - old[name]) for name in old}
            running = jax.lax.stop_gradient(moved)
        factor = jax.lax.rsqrt(variance + EPSILON) * self.scale[...].astype(jnp.float32)
        wide = (wide - mean[None, None, None]) * factor[None, None, None]
        wide = wide + self.bias[...].astype(jnp.float32)[None, None, None]
        return wide.astype(self.dtype), running


def below(path: str, running: Mapping[str, Array]) -> Running:
    """The same statistics by path below the module that has the returning one at `path`."""
    return {f"{path}/{name}": x for name, x in running.items()}
