"""Random crops of whole batches on the device, and points that two crops of an image share.

A box is (top, left, height, width) as shares of the image's sides. Each example draws its own; a crop that has to
overlap others takes the first of `TRIES` draws that does.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tosa_jax.ops.array_types import Images

Boxes = Float[Array, "b 4"]

TRIES = 10
ASPECT = (3 / 4, 4 / 3)
"""Height by width of a box, log-uniform, as in torchvision's RandomResizedCrop."""


def draw_boxes(
    key: jax.Array,
    count: int,
    scale: tuple[float, float],
    others: tuple[Boxes, ...] = (),
    least: float = 0.0,
) -> Boxes:
    """Boxes of `count` images.

    scale   least and largest area, shares of the image in (0, 1].
    others  boxes that each one has to overlap.
    least   the area of each overlap, a share of the image; a box none of whose draws reaches it is the last draw.
    """
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    tries = (count, TRIES)
    area = jax.random.uniform(area_key, tries, minval=scale[0], maxval=scale[1])
    low, high = jnp.log(jnp.asarray(ASPECT))
    aspect = jnp.exp(jax.random.uniform(aspect_key, tries, minval=low, maxval=high))
    sides = jnp.minimum(jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)], axis=2), 1)
    place = jax.random.uniform(place_key, (*tries, 2)) * (1 - sides)
    boxes = jnp.concatenate([place, sides], axis=2)
    good = jnp.ones(tries, bool)
    for other in others:
        shared = overlap(boxes, other[:, None])
        good &= jnp.prod(shared[..., 2:], axis=-1) >= least
    first = jnp.where(good.any(axis=1), good.argmax(axis=1), TRIES - 1)
    return jnp.take_along_axis(boxes, first[:, None, None], axis=1)[:, 0]


def overlap(a: Float[Array, "*n 4"], b: Float[Array, "*m 4"]) -> Float[Array, "... 4"]:
    """The box that two boxes share; its sides are 0 where they share none."""
    low = jnp.maximum(a[..., :2], b[..., :2])
    high = jnp.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    return jnp.concatenate([low, jnp.maximum(high - low, 0)], axis=-1)


def cut(
    images: Images, boxes: Boxes, size: tuple[int, int], flips: Float[Array, " b"]
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
) -> tuple[Float[Array, "b r 2"], Float[Array, " b"]]:
    """`count` points (row, column) a pair of boxes, uniform in what they share, as shares of the image's sides.

    The second array is 1, and 0 for boxes that share nothing, whose points mean nothing.
    """
    box = overlap(a, b)
    place = jax.random.uniform(key, (len(a), count, 2))
    points = box[:, None, :2] + place * box[:, None, 2:]
    return points, (jnp.prod(box[:, 2:], axis=1) > 0).astype(jnp.float32)


def seen_in(
    points: Float[Array, "b r 2"], boxes: Boxes, flips: Float[Array, " b"]
) -> Float[Array, "b r 2"]:
    """Points of the image as shares of the sides of its crop."""
    inside = (points - boxes[:, None, :2]) / boxes[:, None, 2:]
    columns = jnp.where(flips[:, None] > 0, 1 - inside[..., 1], inside[..., 1])
    return jnp.stack([inside[..., 0], columns], axis=2)


def jitter(key: jax.Array, images: Images, strength: float, solarise: float = 0.0) -> Images:
    """Brightness and contrast of images in [0, 1], each changed by a factor in 1 +- `strength`, for four of five.

    solarise  probability in [0, 1] that pixels of an image at .5 or above are inverted.
    """
    on_key, bright_key, contrast_key, invert_key = jax.random.split(key, 4)
    each = (len(images), 1, 1, 1)
    on = jax.random.uniform(on_key, each) < 0.8
    bright, contrast = (
        jax.random.uniform(k, each, minval=1 - strength, maxval=1 + strength)
        for k in (bright_key, contrast_key)
    )
    changed = jnp.clip(images * bright, 0, 1)
    mean = changed.mean(axis=(1, 2, 3), keepdims=True)
    changed = jnp.clip(mean + (changed - mean) * contrast, 0, 1)
    images = jnp.where(on, changed, images)
    if not solarise:
        return images
    inverted = jax.random.uniform(invert_key, each) < solarise
    return jnp.where(inverted & (images >= 0.5), 1 - images, images)
