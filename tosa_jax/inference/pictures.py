"""Images as Python programs have them, whatever holds them -> PIL images of the channels that a model takes.

One rule for all: what a file of the same pixels would give. Alpha is dropped, colours become luma where a model has one
channel, grey is repeated where it has three.
"""

import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tosa_jax.data.decoding import BadImageError, from_16_bits, in_mode_of, open_image, pil_errors

Picture = Any
"""An image: a path, encoded bytes or a binary stream of them, a PIL image of any mode but 32 bits, or an array of
NumPy, JAX or PyTorch, [height, width] or [height, width, 1 to 4 channels]: uint8, uint16 (65535 is white), bool, other
integers in [0, 255], or floats in [0, 1]."""

KINDS = (
    "give a path, encoded bytes, a binary stream, a PIL image or an array [height, width, channels]"
)


def open_picture(picture: Picture, *, channels: int, exif_rotate: bool = False) -> Image.Image:
    """A `Picture` in mode "L" (1 channel) or "RGB" (3).

    exif_rotate  whether a file, stream or PIL image is turned upright as its EXIF orientation says.

    Raises BadImageError: it is no image, or incomplete; OSError: the file cannot be read.
    """
    if isinstance(picture, str | os.PathLike):
        with open(os.path.expanduser(picture), "rb") as file:
            picture = file.read()
    elif hasattr(picture, "read"):
        picture = picture.read()
        if not isinstance(picture, bytes):
            raise BadImageError("a stream of text is no image: open it in binary mode")
    if isinstance(picture, bytes | bytearray | memoryview):
        return open_image(bytes(picture), channels=channels, exif_rotate=exif_rotate)
    if isinstance(picture, Image.Image):
        if not min(picture.size):
            raise BadImageError(f"an image of {picture.width}x{picture.height} has no pixels")
        with pil_errors():
            file_format = picture.format
            turned = ImageOps.exif_transpose(picture) if exif_rotate else picture
            return in_mode_of(turned.copy(), channels, file_format)
    return in_mode_of(_of_array(_host_array(picture)), channels)


def _host_array(picture: Any) -> np.ndarray:
    """An array as NumPy's. Raises BadImageError for anything that is none."""
    if isinstance(picture, list | tuple) or not hasattr(picture, "__array__"):
        raise BadImageError(f"a {type(picture).__name__} is no image: {KINDS}")
    try:
        return np.asarray(picture)
    except Exception as error:  # whatever its library raises
        raise BadImageError(
            f"a {type(picture).__name__} that is no array ({error})"[:200]
        ) from error


def _of_array(array: np.ndarray) -> Image.Image:
    """A PIL image of an array's pixels, alpha dropped. Raises BadImageError."""
    shape, dtype = list(array.shape), array.dtype
    if array.ndim == 3 and 1 <= array.shape[2] <= 4:
        colours = array.shape[2] - (array.shape[2] in (2, 4))  # the last one is alpha
        array = array[:, :, 0] if colours == 1 else array[:, :, :colours]
    elif array.ndim != 2:
        raise BadImageError(
            f"an array {shape} is no image [height, width] or [height, width, 1 to 4]"
        )
    if not array.size:
        raise BadImageError(f"an array {shape} has no pixels")
    return Image.fromarray(np.ascontiguousarray(_to_8_bits(array, str(dtype))))


def _to_8_bits(array: np.ndarray, dtype: str) -> np.ndarray:
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return from_16_bits(array)
    if array.dtype.kind in "iu":
        if array.min() < 0 or array.max() > 255:
            raise BadImageError(
                f"{dtype} pixels from {array.min()} to {array.max()}: give uint8, or uint16 for 16 bits"
            )
        return array.astype(np.uint8)
    if array.dtype.kind != "f" and dtype not in ("bfloat16", "float8_e4m3fn"):
        raise BadImageError(f"an array of {dtype} is no image: {KINDS}")
    values = array.astype(np.float32)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise BadImageError(
            f"{dtype} pixels from {values.min():g} to {values.max():g}: floats are in [0, 1]; give uint8 for 0 to 255"
        )
    return (values * 255 + 0.5).astype(np.uint8)
