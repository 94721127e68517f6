"""Random crops of whole batches on the device, and points that two crops of an image share.

A box is (top, left, height, width) as shares of the image's sides. Each example draws its own; a crop that has to
overlap others takes the first of `TRIES` draws that does.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tosa_jax.ops.array_types import Images

Boxes = Float[Array, "*n 4"]

TRIES = 10
ASPECT = (3 / 4, 4 / 3)
"""Height by width of a box, log-uniform, as in torchvision's RandomResizedCrop."""


def draw_boxes(
    key: jax.Array,
    shape: tuple[int, ...],
    scale: tuple[float, float],
    others: tuple[Float[Array, "*m 4"], ...] = (),
    least: float = 0.0,
) -> Boxes:
    """Boxes [*shape 4].

    scale   least and largest area, shares of the image in (0, 1].
    others  boxes that each one has to overlap, [*shape 4] or with sides of 1.
    least   the area of each overlap, a share of the image; a box none of whose draws reaches it is the last draw.
    """
    draws = jax.random.uniform(key, (4, *shape, TRIES))
    area = scale[0] + (scale[1] - scale[0]) * draws[0]
    low, high = jnp.log(jnp.asarray(ASPECT))
    aspect = jnp.exp(low + (high - low) * draws[1])
    sides = jnp.minimum(jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)], axis=-1), 1)
    place = jnp.moveaxis(draws[2:], 0, -1) * (1 - sides)
    boxes = jnp.concatenate([place, sides], axis=-1)
    good = jnp.ones(area.shape, bool)
    for other in others:
        shared = overlap(boxes, other[..., None, :])
        good &= jnp.prod(shared[..., 2:], axis=-1) >= least
    first = jnp.where(good.any(axis=-1), good.argmax(axis=-1), TRIES - 1)
    return jnp.take_along_axis(boxes, first[..., None, None], axis=-2)[..., 0, :]


def overlap(a: Float[Array, "*n 4"], b: Float[Array, "*m 4"]) -> Float[Array, "... 4"]:
    """The box that two boxes share; its sides are 0 where they share none."""
    low = jnp.maximum(a[..., :2], b[..., :2])
    high = jnp.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    return jnp.concatenate([low, jnp.maximum(high - low, 0)], axis=-1)


def cut(
    images: Images, boxes: Float[Array, "b 4"], size: tuple[int, int], flips: Float[Array, " b"]
) -> Float[Array, "b rows columns c"]:
    """The boxes of images, resized to (height, width) pixels by antialiased triangles, mirrored where `flips` is 1."""
    shape = jnp.asarray(images.shape[1:3], jnp.float32)

    def one(image, box, flip):
        scale = jnp.asarray(size, jnp.float32) / (box[2:] * shape)
        out = jax.image.scale_and_translate(
            image, (*size, image.shape[2]), (0, 1), scale, -box[:2] * shape * scale, "linear"
        )
        return jnp.where(flip > 0, out[:, ::-1], out)

    return jax.vmap(one)(images, boxes, flips)


def shared_points(
    key: jax.Array, count: int, a: Boxes, b: Boxes
) -> tuple[Float[Array, "*n r 2"], Float[Array, "*n"]]:
    """`count` points (row, column) a pair of boxes, uniform in what they share, as shares of the image's sides.

    The second array is 1, and 0 for boxes that share nothing, whose points mean nothing.
    """
    box = overlap(a, b)
    place = jax.random.uniform(key, (*box.shape[:-1], count, 2))
    points = box[..., None, :2] + place * box[..., None, 2:]
    return points, (jnp.prod(box[..., 2:], axis=-1) > 0).astype(jnp.float32)


def seen_in(
    points: Float[Array, "*n r 2"], boxes: Float[Array, "*m 4"], flips: Float[Array, "*m"]
) -> Float[Array, "*n r 2"]:
    """Points of the image as shares of the sides of its crop; boxes and flips broadcast."""
    inside = (points - boxes[..., None, :2]) / boxes[..., None, 2:]
    columns = jnp.where(flips[..., None] > 0, 1 - inside[..., 1], inside[..., 1])
    return jnp.stack([inside[..., 0], columns], axis=-1)


def jitter(key: jax.Array, images: Images, strength: float, solarise: Float[Array, " b"]) -> Images:
    """Brightness and contrast of images in [0, 1], each changed by a factor in 1 +- `strength`, for four of five.

    solarise  each image's probability in [0, 1] that its pixels at .5 or above are inverted.
    """
    draws = jax.random.uniform(key, (4, len(images), 1, 1, 1))
    bright, contrast = 1 + strength * (2 * draws[:2] - 1)
    changed = jnp.clip(images * bright, 0, 1)
    mean = changed.mean(axis=(1, 2, 3), keepdims=True)
    changed = jnp.clip(mean + (changed - mean) * contrast, 0, 1)
    images = jnp.where(draws[2] < 0.8, changed, images)
    inverted = draws[3] < solarise[:, None, None, None]
    return jnp.where(inverted & (images >= 0.5), 1 - images, images)
