"""Images of any proportion in one batch, as SigLIP 2's NaFlex (Tschannen et al. 2025, arXiv 2502.14786).

The patches of an image lie one below the other in a strip, as many as `ViTConfig.max_patches`, and what an image does
not fill is padding. So images of every proportion are arrays of one shape, which one program takes: float
[b max_patches*p p c] for patches of p pixels, beside int32 [b 2], the rows and columns of the patches of each image.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import Grids, Indices, Present


def strip_shape(config: ViTConfig) -> tuple[int, int]:
    """Height and width of a strip of patches, pixels."""
    return config.max_patches * config.patch_size, config.patch_size


def to_strips(
    images: Sequence[UInt8[np.ndarray, "_ _ c"]], config: ViTConfig
) -> tuple[UInt8[np.ndarray, "b strip p c"], Int32[np.ndarray, "b 2"]]:
    """Images of several sizes, uint8 [height width c] each -> their strips of patches, zeros below, and their grids.

    Raises ConfigError: patches do not divide an image, or there are more of them than `max_patches`.
    """
    side = config.patch_size
    strips = np.zeros((len(images), *strip_shape(config), config.in_chans), np.uint8)
    grids = np.ones((len(images), 2), np.int32)
    for i, image in enumerate(images):
        height, width, channels = image.shape
        grid = rows, columns = height // side, width // side
        fits = (rows * side, columns * side) == (height, width)
        check(
            fits and 0 < rows * columns <= config.max_patches,
            f"an image of {height}x{width} pixels is not made of 1 to {config.max_patches} patches of {side}x{side}: "
            "Predictor.prepare makes such images",
        )
        patches = image.reshape(rows, side, columns, side, channels).swapaxes(1, 2)
        strips[i, : rows * columns * side] = patches.reshape(-1, side, channels)
        grids[i] = grid
    return strips, grids


def presence(grids: Grids, config: ViTConfig) -> Present:
    """Which of all n tokens are there, bool [b n]: prefix tokens and an image's patches. The others are padding."""
    place = jnp.arange(config.num_tokens) - config.num_prefix_tokens
    return place[None] < (grids[:, 0] * grids[:, 1])[:, None]


def positions_of(
    positions: Float[Array, "m d"], grids: Grids, config: ViTConfig
) -> Float[Array, "b n d"]:
    """Positions of `config`, [m d], with the patches' resampled for the grid of each image. Padding has some, too.

    n is that of all tokens, or of the patches alone where prefix tokens have no positions. It is the same as
    `resample_matrix(..., "bilinear_antialias")` along both sides.
    """
    sizes = jnp.maximum(grids, 1)
    place = jnp.arange(config.max_patches, dtype=jnp.int32)[None]
    columns = sizes[:, 1:]
    by_side = place // columns, place % columns
    weights = [
        _weights(at, size[:, None], old)
        for at, size, old in zip(by_side, sizes.T, config.grid, strict=True)
    ]
    both = weights[0][:, :, :, None] * weights[1][:, :, None]
    both = both.reshape(*both.shape[:2], -1)
    own = positions.astype(jnp.float32)
    num_prefix = len(own) - both.shape[2]
    patches = jnp.einsum("bnm,md->bnd", both, own[num_prefix:], precision="highest")
    prefix = jnp.broadcast_to(own[None, :num_prefix], (len(grids), num_prefix, own.shape[1]))
    return jnp.concatenate([prefix, patches], axis=1)


def _weights(
    at: Int32[Array, "b n"], size: Int32[Array, "b 1"], old: int
) -> Float[Array, "b n old"]:
    """Weights of `old` samples of a line for those at `at` of `size` new ones."""
    scale = (old / size.astype(jnp.float32))[:, :, None]
    center = (at.astype(jnp.float32)[:, :, None] + 0.5) * scale - 0.5
    distance = jnp.abs(jnp.arange(old, dtype=jnp.float32)[None, None] - center)
    weights = jnp.maximum(1 - distance / jnp.maximum(scale, 1.0), 0.0)
    return weights / jnp.maximum(weights.sum(axis=2, keepdims=True), 1e-6)


def without_padding(selected: Indices, present: Present) -> Indices:
    """Selected tokens [b s], with -1 for padding, which an image with fewer patches than that has among them."""
    return jnp.where(jnp.take_along_axis(present, selected, axis=1), selected, -1)
