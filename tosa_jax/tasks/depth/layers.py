"""What both decoders are made of: maps, convolutions, RefineNet's residual unit, two ways to resize."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tosa_jax.models.layers import convolution
from tosa_jax.tasks.depth.config import DepthConfig

FeatureMap = Float[Array, "b rows columns f"]
AnyMap = Float[Array, "b _ _ f"]

SCALES = (4.0, 2.0, 1.0, 0.5)
"""Resolution of the map made of each depth over that of the patch grid, from the shallowest depth on."""

START = 0.25
"""Depth of an untrained network over `max_depth`: near the mean of NYU's rooms (of 10 m) and KITTI's roads (80 m)."""


def start_bias(config: DepthConfig) -> nnx.Param:
    """The bias under the sigmoid from which training starts."""
    return nnx.Param(jnp.full(1, math.log(START / (1 - START)), config.param_dtype))


def map_shape(grid: tuple[int, int], scale: float) -> tuple[int, int]:
    """Rows and columns of the map at `scale` times the patch grid."""
    rows, columns = (math.ceil(side * scale) for side in grid)
    return rows, columns


def resize(x: AnyMap, size: tuple[int, int]) -> AnyMap:
    """Bilinear, pixel centres at halves; untouched where the size is the same."""
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear")


def resize_corners(x: AnyMap, size: tuple[int, int]) -> AnyMap:
    """Bilinear, the centres of corner pixels on each other (`align_corners=True` in PyTorch)."""
    if x.shape[1:3] == size:
        return x
    rows, columns = (
        jnp.asarray(_corners_matrix(old, new), x.dtype)
        for old, new in zip(x.shape[1:3], size, strict=True)
    )
    return jnp.einsum("ri,cj,bijf->brcf", rows, columns, x, precision="highest")


def _corners_matrix(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The matrix that takes `old` samples of a line to `new` ones, ends on ends."""
    places = np.linspace(0, old - 1, new)
    return np.maximum(1 - np.abs(places[:, None] - np.arange(old)), 0.0)


class ResidualUnit(nnx.Module):
    """`x + conv(relu(conv(relu(x))))`: RefineNet's residual unit (Lin et al. 2017)."""

    def __init__(self, config: DepthConfig, *, rngs: nnx.Rngs) -> None:
        channels = config.decoder_dim
        self.conv1 = convolution(config, channels, channels, 3, rngs)
        self.conv2 = convolution(config, channels, channels, 3, rngs)
        self.weights = 2 * 9 * channels**2

    def __call__(self, x: FeatureMap) -> FeatureMap:
        return x + self.conv2(jax.nn.relu(self.conv1(jax.nn.relu(x))))
