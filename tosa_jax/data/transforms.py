"""Host-side image work: encoded bytes to uint8 arrays, and augmentations drawn for each example.

Normalisation, mixup, cutmix and erasing run on the device: everything here stays uint8.
"""

import io
import math

import grain
import numpy as np
from jaxtyping import UInt8
from PIL import Image

_MODES = {1: "L", 3: "RGB"}  # channels -> PIL mode

_MAX_SHIFT = 1 / 8  # of the side, each way
_MAX_DEGREES = 10.0
_MIN_SCALE, _MAX_SCALE = 0.9, 1.1


def decode_image(encoded: bytes, *, image_size: int, channels: int) -> UInt8[np.ndarray, "s s c"]:
    """An encoded image (PNG, JPEG, ...) as uint8 [image_size, image_size, channels].

    Another size is resized, bilinear and antialiased, to the square: an oblong image is squeezed,
    not cropped. Grey is repeated over three channels; colour becomes luma in one.

    Raises:
      ValueError, OSError: the bytes are no image, are cut short, or hold over 8 bits a channel.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        if image.mode.startswith(("I", "F")):
            # PIL would clip these at 255, silently.
            raise ValueError(f"image mode {image.mode} has more than 8 bits a channel")
        # Converted first: a palette or a bilevel image cannot be interpolated.
        image = image.convert(_MODES[channels])
        if image.size != (image_size, image_size):
            # PIL widens the filter when it makes an image smaller: that is the antialiasing.
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(image_size, image_size, channels)


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


AUGMENTATIONS: dict[str, type[grain.transforms.RandomMap] | None] = {
    "none": None,
    "shift": Shift,
    "shift_rotate": ShiftRotate,
    "shift_flip": ShiftFlip,
}
