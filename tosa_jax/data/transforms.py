"""Augmentations of labelled images, drawn on the host for each example: uint8 in, uint8 out.

Normalisation, mixup, cutmix and erasing run on the device (`tasks`).
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tosa_jax.data.decoding import to_array
from tosa_jax.data.examples import Augmentation, Example
from tosa_jax.data.randaugment import rand_augment

_MAX_SHIFT = 1 / 8  # of the side, each way
_MAX_DEGREES = 10.0
_MIN_SCALE, _MAX_SCALE = 0.9, 1.1

_CROP_AREA = (0.08, 1.0)  # share of the image
_CROP_RATIO = (3 / 4, 4 / 3)  # width by height, log-uniform
_CROP_TRIES = 10


def shift_image(
    image: UInt8[np.ndarray, "s s c"], down: int, right: int
) -> UInt8[np.ndarray, "s s c"]:
    """Moves the image by whole pixels (negative: up, left). What comes in from outside is zero."""
    height, width = image.shape[:2]
    out = np.zeros_like(image)
    out[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image[
        max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
    ]
    return out


def warp_image(
    image: UInt8[np.ndarray, "s s c"], *, down: float, right: float, degrees: float, scale: float
) -> UInt8[np.ndarray, "s s c"]:
    """Rotates (anticlockwise) and scales the image about its centre, then moves it, in one bilinear resampling.

    `down` and `right` are pixels. What comes in from outside is zero.
    """
    height, width, channels = image.shape
    cos, sin = math.cos(math.radians(degrees)) / scale, math.sin(math.radians(degrees)) / scale
    # PIL asks for the map from output to input pixels: it undoes the shift, then the rotation.
    x, y = width / 2 + right, height / 2 + down
    matrix = (
        *(cos, -sin, width / 2 - cos * x + sin * y),
        *(sin, cos, height / 2 - sin * x - cos * y),
    )
    source = Image.fromarray(image[..., 0] if channels == 1 else image)
    warped = source.transform(
        source.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    return np.asarray(warped).reshape(image.shape)


def _random_shift(
    image: UInt8[np.ndarray, "s s c"], rng: np.random.Generator
) -> UInt8[np.ndarray, "s s c"]:
    limit = int(image.shape[0] * _MAX_SHIFT)
    down, right = rng.integers(-limit, limit + 1, size=2).tolist()
    return shift_image(image, down, right)


class Shift(Augmentation):
    """Moves the image by whole pixels, up to an eighth of its side each way. What comes in is zero."""

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        return {**element, "image": _random_shift(element["image"], rng)}


class ShiftFlip(Augmentation):
    """`Shift`, then a left-right flip with probability 1/2."""

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        image = _random_shift(element["image"], rng)
        return {**element, "image": image[:, ::-1] if rng.random() < 0.5 else image}


class ShiftRotate(Augmentation):
    """Moves the image by up to an eighth of its side (not in whole pixels), rotates it by up to 10 degrees either
    way and scales it by 0.9 to 1.1; all four are drawn uniformly."""

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        image = element["image"]
        limit = image.shape[0] * _MAX_SHIFT
        # rng.uniform with arrays of bounds is slow for four numbers: draw in [-1, 1) and scale.
        down, right, turn, zoom = (2 * rng.random(4) - 1).tolist()
        middle, spread = (_MAX_SCALE + _MIN_SCALE) / 2, (_MAX_SCALE - _MIN_SCALE) / 2
        image = warp_image(
            image,
            down=down * limit,
            right=right * limit,
            degrees=turn * _MAX_DEGREES,
            scale=middle + zoom * spread,
        )
        return {**element, "image": image}


def draw_crop(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws (left, top, right, bottom) of a crop, pixels, as torchvision's RandomResizedCrop does.

    Its area is 0.08 to 1 of the image's, uniform; its width over its height is 3/4 to 4/3,
    log-uniform. If none of ten draws fits, it is the largest centred crop with such a ratio.
    """
    low, high = (math.log(ratio) for ratio in _CROP_RATIO)
    for _ in range(_CROP_TRIES):
        u, v = rng.random(2).tolist()
        area = width * height * (_CROP_AREA[0] + u * (_CROP_AREA[1] - _CROP_AREA[0]))
        ratio = math.exp(low + v * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            top = int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    ratio = min(max(width / height, _CROP_RATIO[0]), _CROP_RATIO[1])
    # At least one pixel: torchvision fails on one 30,000 wide and 1 high.
    w = min(width, max(1, round(height * ratio)))
    h = min(height, max(1, round(width / ratio)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_resized_crop(
    image: Image.Image, image_size: int, rng: np.random.Generator
) -> Image.Image:
    """A crop by `draw_crop`, resized to image_size x image_size: bicubic, antialiased (PIL)."""
    # Not resize(box=...): its filter would read pixels outside the crop.
    part = image.crop(draw_crop(*image.size, rng))
    return part.resize((image_size, image_size), Image.Resampling.BICUBIC)


def crop_flip(image: Image.Image, image_size: int, rng: np.random.Generator) -> Image.Image:
    """`random_resized_crop`, then a left-right flip with probability 1/2."""
    image = random_resized_crop(image, image_size, rng)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def deit(image: Image.Image, image_size: int, rng: np.random.Generator) -> Image.Image:
    """`crop_flip`, then RandAugment `rand-m9-mstd0.5-inc1`, for RGB images."""
    return rand_augment(crop_flip(image, image_size, rng), rng)


CropTransform = Callable[[Image.Image, int, np.random.Generator], Image.Image]


class Crop(Augmentation):
    """Applies `transform` to a whole PIL image of any size; the result is uint8 [image_size, image_size, c]."""

    def __init__(self, transform: CropTransform, image_size: int) -> None:
        self._transform, self._image_size = transform, image_size

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        return {
            **element,
            "image": to_array(self._transform(element["image"], self._image_size, rng)),
        }


CROPS: dict[str, CropTransform] = {"crop_flip": crop_flip, "deit": deit}
"""Augmentations of whole PIL images. DeiT's mixing and erasing are done on the device."""

AUGMENTATIONS: dict[str, type[Augmentation] | None] = {
    "none": None,
    "shift": Shift,
    "shift_rotate": ShiftRotate,
    "shift_flip": ShiftFlip,
    **dict.fromkeys(CROPS, Crop),
}
"""By `DataConfig.augment`. All but `CROPS` take arrays that have the final size."""


def make_augmentation(name: str, image_size: int) -> Augmentation | None:
    """The augmentation that `AUGMENTATIONS` lists as `name`; None: nothing is drawn."""
    if name in CROPS:
        return Crop(CROPS[name], image_size)
    transform = AUGMENTATIONS[name]
    return transform() if transform else None
