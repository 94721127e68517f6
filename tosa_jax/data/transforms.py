"""Host-side augmentations, drawn for each example: uint8 images in, uint8 images out.

Normalisation, mixup, cutmix and erasing run on the device: everything here stays uint8.
"""

import math
from collections.abc import Callable

import grain
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tosa_jax.data.decoding import to_array
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
    """The image moved by whole pixels (negative: up, left); what moves in is zero."""
    height, width = image.shape[:2]
    out = np.zeros_like(image)
    out[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image[
        max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
    ]
    return out


def warp_image(
    image: UInt8[np.ndarray, "s s c"], *, down: float, right: float, degrees: float, scale: float
) -> UInt8[np.ndarray, "s s c"]:
    """One bilinear affine warp: rotated (anticlockwise) and scaled about the centre, then moved.

    What comes from outside the image is zero.
    """
    height, width, channels = image.shape
    cos, sin = math.cos(math.radians(degrees)) / scale, math.sin(math.radians(degrees)) / scale
    # PIL wants the map from output to input: undo the shift, then the rotation about the centre.
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


class Shift(grain.transforms.RandomMap):
    """Moves the image by up to an eighth of its side each way; what moves in is zero."""

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        return {**element, "image": _random_shift(element["image"], rng)}


class ShiftFlip(grain.transforms.RandomMap):
    """`Shift`, and left and right exchanged every second time."""

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        image = _random_shift(element["image"], rng)
        return {**element, "image": image[:, ::-1] if rng.random() < 0.5 else image}


class ShiftRotate(grain.transforms.RandomMap):
    """Moves as far as `Shift`, by any fraction; turns up to 10 degrees; scales by 0.9 to 1.1."""

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        image = element["image"]
        limit = image.shape[0] * _MAX_SHIFT
        # uniform(low, high) on arrays is slow for four numbers; these are scaled from [-1, 1).
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
    """(left, top, right, bottom) of a random crop, as torchvision's RandomResizedCrop draws it.

    0.08 to 1 of the area with 3:4 to 4:3 for width by height, in up to ten tries; where none fits,
    the largest centred crop of a ratio within these bounds.
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
    """`draw_crop`, then that part alone resized to the square, bicubic and antialiased (PIL)."""
    # Not resize(box=...): its filter would reach over the border of the crop.
    part = image.crop(draw_crop(*image.size, rng))
    return part.resize((image_size, image_size), Image.Resampling.BICUBIC)


def crop_flip(image: Image.Image, image_size: int, rng: np.random.Generator) -> Image.Image:
    """`random_resized_crop`, and left and right exchanged every second time."""
    image = random_resized_crop(image, image_size, rng)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def deit(image: Image.Image, image_size: int, rng: np.random.Generator) -> Image.Image:
    """`crop_flip`, then RandAugment `rand-m9-mstd0.5-inc1`; RGB only."""
    return rand_augment(crop_flip(image, image_size, rng), rng)


class _Crop(grain.transforms.RandomMap):
    """A whole opened image (PIL, any size) -> uint8 [image_size, image_size, c]."""

    transform: Callable[[Image.Image, int, np.random.Generator], Image.Image]

    def __init__(self, image_size: int) -> None:
        self._image_size = image_size

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        image = type(self).transform(element["image"], self._image_size, rng)
        return {**element, "image": to_array(image)}


class CropFlip(_Crop):
    """Random resized crop and flip of a whole PIL image."""

    transform = staticmethod(crop_flip)


class Deit(_Crop):
    """DeiT's augmentation of a whole PIL image; mixing and erasing are `data.mixing`'s."""

    transform = staticmethod(deit)


CROPS: dict[str, type[_Crop]] = {"crop_flip": CropFlip, "deit": Deit}
"""Those that take a whole PIL image of any size and are made with `image_size`."""

AUGMENTATIONS: dict[str, type[grain.transforms.RandomMap] | None] = {
    "none": None,
    "shift": Shift,
    "shift_rotate": ShiftRotate,
    "shift_flip": ShiftFlip,
    **CROPS,
}
"""By the name in `DataConfig.augment`; None: nothing is drawn."""
