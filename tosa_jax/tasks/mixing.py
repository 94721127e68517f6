"""Mixup, cutmix and random erasing, on the device, inside the jitted training step.

This is timm's batch mode, as DeiT uses it: one lambda and one box for the batch; the partner of an image is the image
at its place in the reversed batch. Images are erased first, then mixed.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tosa_jax.errors import ConfigError
from tosa_jax.ops.array_types import Images

Targets = Float[Array, "b classes"]

_ERASE_AREA = (0.02, 1 / 3)  # share of the image
_ERASE_ASPECT = (0.3, 1 / 0.3)  # height by width, log-uniform
_ERASE_TRIES = 10  # an image none of whose boxes fits stays as it is


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """How training batches are mixed and erased; all zero: not at all. Raises ConfigError for values out of range.

    mixup, cutmix  alpha of Beta(alpha, alpha), from which lambda is drawn; 0: not used.
    switch_prob    probability in [0, 1] of cutmix if both are used.
    erase_prob     probability in [0, 1] that a box of an image is erased.
    align_labels   labels travel with tokens through the network (TL-Align, Xiao et al. 2022, arXiv 2210.06455), so that
                   the target is mixed as the network mixed the tokens and not as the pixels were. The images are the
                   same. Needs cutmix; batches that mixup mixes keep their targets.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    switch_prob: float = 0.5
    erase_prob: float = 0.0
    align_labels: bool = False

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be 0 or more")
        for name in ("switch_prob", "erase_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be in [0, 1]")
        if self.align_labels and not self.cutmix:
            raise ConfigError(
                "align_labels=True needs cutmix above 0: without it all tokens of an image have the same label"
            )


def mix(
    config: MixingConfig, key: jax.Array, images: Images, targets: Targets
) -> tuple[Images, Targets]:
    """A batch after mixup or cutmix; dtypes stay.

    images   float [b h w c], normalised or not.
    targets  float [b classes], each row a distribution, smoothed or not.
    """
    if not (config.mixup or config.cutmix):
        return images, targets
    own = own_shares(config, key, (images.shape[1], images.shape[2]))
    share = own.mean()
    labels = targets * share + targets[::-1] * (1 - share)
    return mix_images(images, own), labels.astype(targets.dtype)


def mix_images(images: Images, own: Float[Array, "h w"]) -> Images:
    """The images, of which each keeps the share `own` of its pixels and gets the rest of its partner's."""
    own = own[None, :, :, None]
    return (images * own + images[::-1] * (1 - own)).astype(images.dtype)


def own_shares(
    config: MixingConfig, key: jax.Array, size: tuple[int, int]
) -> Float[Array, "height width"]:
    """Draws the share in [0, 1] that each pixel of an image of (height, width) keeps of itself, for mixup or cutmix."""
    height, width = size
    switch_key, share_key, box_key = jax.random.split(key, 3)
    if config.mixup and config.cutmix:
        use_cutmix = jax.random.uniform(switch_key) < config.switch_prob
    else:
        use_cutmix = jnp.asarray(config.cutmix > 0)
    alpha = jnp.where(use_cutmix, config.cutmix, config.mixup)
    # Lambda: the share that an image keeps of its own pixels and label.
    kept = jax.random.beta(share_key, alpha, alpha, dtype=jnp.float32)
    box = _cutmix_box(box_key, kept, height, width) & use_cutmix
    kept = jnp.where(use_cutmix, 1.0, kept)
    # One expression for both: mixup has no box, cutmix keeps all outside of its box.
    return jnp.where(box, 0.0, kept)


def patch_shares(own: Float[Array, "height width"], patch_size: int) -> Float[Array, " patches"]:
    """The mean of `own_shares` over each patch, in raster order."""
    height, width = (side // patch_size for side in own.shape)
    return own.reshape(height, patch_size, width, patch_size).mean(axis=(1, 3)).reshape(-1)


def _cutmix_box(
    key: jax.Array, kept: Float[Array, ""], height: int, width: int
) -> Bool[Array, "height width"]:
    """True in a box of 1 - `kept` of the area around a uniform centre, cut off at the edges."""
    side = jnp.sqrt(1 - kept)
    inside = []
    for key_, length in zip(jax.random.split(key), (height, width), strict=True):
        half = (length * side).astype(jnp.int32) // 2
        centre = jax.random.randint(key_, (), 0, length)
        at = jnp.arange(length)
        inside.append((at >= centre - half) & (at < centre + half))
    return inside[0][:, None] & inside[1][None, :]


def erase(config: MixingConfig, key: jax.Array, images: Images) -> Images:
    """Random erasing in pixel mode: a box of each chosen image becomes N(0, 1) noise a pixel.

    `images` are normalised, float [b h w c]; the dtype stays. A box has 0.02 to 1/3 of the area and
    an aspect (height / width) of 0.3 to 1 / 0.3; Zhong et al. 2017 (arXiv 1708.04896), as in timm.
    """
    if not config.erase_prob:
        return images
    chosen_key, box_key, noise_key = jax.random.split(key, 3)
    b, height, width = images.shape[:3]
    chosen = jax.random.uniform(chosen_key, (b,)) < config.erase_prob
    box = _erase_boxes(box_key, b, height, width) & chosen[:, None, None]
    noise = jax.random.normal(noise_key, images.shape, jnp.float32).astype(images.dtype)
    return jnp.where(box[..., None], noise, images)


def _erase_boxes(key: jax.Array, b: int, height: int, width: int) -> Bool[Array, "b height width"]:
    area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
    tries = (b, _ERASE_TRIES)
    low, high = (share * height * width for share in _ERASE_AREA)
    area = jax.random.uniform(area_key, tries, minval=low, maxval=high)
    low, high = jnp.log(jnp.asarray(_ERASE_ASPECT))
    aspect = jnp.exp(jax.random.uniform(aspect_key, tries, minval=low, maxval=high))
    rows = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    columns = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (rows < height) & (columns < width)
    # The first that fits, as a loop over tries would find it.
    first = jnp.argmax(fits, axis=1)[:, None]
    rows, columns = (jnp.take_along_axis(x, first, axis=1) for x in (rows, columns))
    top = jax.random.randint(top_key, (b, 1), 0, jnp.maximum(height - rows, 0) + 1)
    left = jax.random.randint(left_key, (b, 1), 0, jnp.maximum(width - columns, 0) + 1)
    at_row, at_column = jnp.arange(height)[None], jnp.arange(width)[None]
    in_rows = (at_row >= top) & (at_row < top + rows) & fits.any(axis=1, keepdims=True)
    in_columns = (at_column >= left) & (at_column < left + columns)
    return in_rows[:, :, None] & in_columns[:, None, :]
