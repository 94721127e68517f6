"""Host-side augmentations of a picture and its depth map, drawn for each example; the two always move together.

As BTS (Lee et al. 2019, arXiv 1907.10326, `bts_dataloader.py`) does it for NYU Depth V2, and NeWCRFs after it: the
sensor's borders, rotation, random crop, flip, and every second time gamma, brightness and colour. Examples are
{"image": uint8 [h w c], "depth": float32 [h w], metres, 0 where nothing was measured}.
"""

from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from tosa_jax.data.decoding import BadImageError, to_array

Picture = UInt8[np.ndarray, "h w c"]
Depth = Float[np.ndarray, "h w"]
Size = tuple[int, int]
"""Height and width, pixels."""

_FLIP_SHARE = 0.5
_COLOUR_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """How much is drawn: turns up to `degrees` each way, factors between two numbers; None: never.

    gamma       exponent of a pixel in [0, 1].
    brightness  factor of all channels after it.
    colour      factor of each channel, drawn one by one.
    """

    flip: bool = False
    degrees: float = 0.0
    gamma: tuple[float, float] | None = None
    brightness: tuple[float, float] | None = None
    colour: tuple[float, float] | None = None


DEPTH_AUGMENTATIONS: dict[str, Strengths] = {
    "none": Strengths(),
    "flip": Strengths(flip=True),
    "nyu": Strengths(
        flip=True, degrees=2.5, gamma=(0.9, 1.1), brightness=(0.75, 1.25), colour=(0.9, 1.1)
    ),
}
"""By the name in `DataConfig.augment`; a random crop belongs to all but "none", which takes the centre."""


class DepthAugment(grain.transforms.RandomMap):
    """An example of any size -> one of `size`, under the draws of its place in the stream.

    box  (top, bottom, left, right), half-open, in pixels of the whole image: where the sensor's picture is trusted.
         A whole image (of `size` already) keeps its pixels and loses the depth outside; a larger one is cut to it.
    """

    def __init__(self, size: Size, augment: str, box: tuple[int, ...] = ()) -> None:
        self._size, self._box = size, box
        self._strengths = DEPTH_AUGMENTATIONS[augment]
        self._centred = augment == "none"

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        """Raises BadImageError where the image, or what is left of it in the box, is smaller than `size`."""
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
    """Depth outside of a box set to 0 where the image has `size`; else both cut to the box.

    NYU's pictures have white borders, where colour and depth do not cover each other: rows 45:472, columns 43:608.

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
    """Both turned about the centre, anticlockwise: the image bilinear, the depth nearest, so that no distance is
    invented between two objects. What comes from outside is black, without depth."""
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    turned = to_array(picture.rotate(degrees, Image.Resampling.BILINEAR))
    distances = Image.fromarray(depth.astype(np.float32, copy=False))
    return turned, np.asarray(distances.rotate(degrees, Image.Resampling.NEAREST))


def place_crop(whole: Size, size: Size, rng: np.random.Generator | None) -> tuple[int, int]:
    """Top and left of a crop, uniform over all places that fit; without `rng` the central one.

    Raises:
      BadImageError: none fits.
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
    """Pixels x in [0, 1] become x**gamma * brightness * colour, cut off at 1."""
    # All that can happen to a pixel: 256 values a channel.
    table = (np.arange(256) / 255) ** gamma * brightness * colour[:, None]
    table = np.rint(np.minimum(table, 1) * 255).astype(np.uint8)
    return np.stack([table[c][image[..., c]] for c in range(image.shape[2])], axis=-1)
