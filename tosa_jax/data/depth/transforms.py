"""Augmentations of an image together with its depth map, drawn on the host for each example.

They follow BTS for NYU Depth V2 (Lee et al. 2019, arXiv 1907.10326, `bts_dataloader.py`), as NeWCRFs does: the
borders of the sensor are removed; then come rotation, random crop, flip, and for half of the examples gamma,
brightness and colour. Examples are {"image": uint8 [h w c], "depth": float32 [h w] in metres, 0: not measured}.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from tosa_jax.data.decoding import BadImageError, to_array
from tosa_jax.data.examples import Augmentation, Example

Picture = UInt8[np.ndarray, "h w c"]
Depth = Float[np.ndarray, "h w"]
Size = tuple[int, int]
"""Height and width, pixels."""

_FLIP_SHARE = 0.5
_COLOUR_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """How strong the draws of an augmentation are.

    flip        whether half of the examples are mirrored left to right.
    degrees     largest rotation, either way.
    gamma       range of the exponent of pixels in [0, 1]; None: gamma, brightness and colour stay.
    brightness  range of a factor of all channels.
    colour      range of a factor drawn for each channel.
    """

    flip: bool = False
    degrees: float = 0.0
    gamma: tuple[float, float] | None = None
    brightness: tuple[float, float] = (1.0, 1.0)
    colour: tuple[float, float] = (1.0, 1.0)


DEPTH_AUGMENTATIONS: dict[str, Strengths] = {
    "none": Strengths(),
    "flip": Strengths(flip=True),
    "nyu": Strengths(
        flip=True, degrees=2.5, gamma=(0.9, 1.1), brightness=(0.75, 1.25), colour=(0.9, 1.1)
    ),
}
"""By `DataConfig.augment`. All take a random crop, except "none", which takes the central one."""


class DepthAugment(Augmentation):
    """Augments an example of any size to one of `size`.

    size     height and width of the result, pixels.
    augment  a key of `DEPTH_AUGMENTATIONS`.
    box      (top, bottom, left, right) in pixels of the stored image, bottom and right exclusive: the part where
             colour and depth are both valid, see `trust_box`; () is the whole image.
    """

    def __init__(self, size: Size, augment: str, box: tuple[int, ...] = ()) -> None:
        self._size, self._box = size, box
        self._strengths = DEPTH_AUGMENTATIONS[augment]
        self._centred = augment == "none"

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        """The augmented example. Raises BadImageError if the image, or its part in the box, is smaller than `size`."""
        image, depth = element["image"], element["depth"]
        strengths = self._strengths
        if self._box:
            image, depth = trust_box(image, depth, self._size, self._box)
        if strengths.degrees:
            image, depth = rotate(image, depth, rng.uniform(-1, 1) * strengths.degrees)
        top, left = place_crop(depth.shape, self._size, None if self._centred else rng)
        image, depth = (
            x[top : top + self._size[0], left : left + self._size[1]] for x in (image, depth)
        )
        if strengths.flip and rng.random() < _FLIP_SHARE:
            image, depth = image[:, ::-1], depth[:, ::-1]
        if strengths.gamma and rng.random() < _COLOUR_SHARE:
            image = change_colours(
                image,
                gamma=rng.uniform(*strengths.gamma),
                brightness=rng.uniform(*strengths.brightness),
                colour=rng.uniform(*strengths.colour, image.shape[2]),
            )
        return {
            **element,
            "image": np.ascontiguousarray(image),
            "depth": np.ascontiguousarray(depth),
        }


def trust_box(
    image: Picture, depth: Depth, size: Size, box: tuple[int, ...]
) -> tuple[UInt8[np.ndarray, "new_h new_w c"], Float[np.ndarray, "new_h new_w"]]:
    """Removes what lies outside a box: from the depth alone if the image has `size` already, else from both.

    In the first case the depth outside becomes 0, and the image is unchanged. In the second both are cut to the box.
    NYU Depth V2 has white borders without depth: the valid part is rows 45 to 471, columns 43 to 607.

    Raises:
      BadImageError: the box reaches out of the image.
    """
    top, bottom, left, right = box
    if bottom > depth.shape[0] or right > depth.shape[1]:
        raise BadImageError(
            f"depth_box={box} reaches out of {'x'.join(map(str, depth.shape))} pixels"
        )
    if depth.shape != size:
        return image[top:bottom, left:right], depth[top:bottom, left:right]
    trusted = np.zeros_like(depth)
    trusted[top:bottom, left:right] = depth[top:bottom, left:right]
    return image, trusted


def rotate(image: Picture, depth: Depth, degrees: float) -> tuple[Picture, Depth]:
    """Rotates both anticlockwise about the centre. What comes in from outside is black and has depth 0.

    The image is interpolated bilinearly; depth takes the nearest pixel, since the mean of two objects' distances is
    the distance of neither.
    """
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    turned = to_array(picture.rotate(degrees, Image.Resampling.BILINEAR))
    distances = Image.fromarray(depth.astype(np.float32, copy=False))
    return turned, np.asarray(distances.rotate(degrees, Image.Resampling.NEAREST))


def place_crop(whole: Size, size: Size, rng: np.random.Generator | None) -> tuple[int, int]:
    """Top and left of a crop of `size` in an image of size `whole`: uniformly drawn, or central without `rng`.

    Raises:
      BadImageError: the image is smaller than the crop.
    """
    free = [have - want for have, want in zip(whole, size, strict=True)]
    if min(free) < 0:
        raise BadImageError(
            f"{whole[0]}x{whole[1]} pixels are smaller than image_size={size[0]}x{size[1]}"
        )
    if rng is None:
        return free[0] // 2, free[1] // 2
    return int(rng.integers(free[0] + 1)), int(rng.integers(free[1] + 1))


def change_colours(
    image: Picture, *, gamma: float, brightness: float, colour: Float[np.ndarray, " c"]
) -> Picture:
    """Pixels x in [0, 1] become min(1, x**gamma * brightness * colour), where colour has a factor a channel."""
    # A table of the 256 possible values of each channel is faster than arithmetic on every pixel.
    table = (np.arange(256) / 255) ** gamma * brightness * colour[:, None]
    table = np.rint(np.minimum(table, 1) * 255).astype(np.uint8)
    return np.stack([table[c][image[..., c]] for c in range(image.shape[2])], axis=-1)
