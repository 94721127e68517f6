"""Encoded images of any kind and size -> uint8 arrays of one form.

Pixels are what torchvision's and timm's training sees, `Image.open(file).convert("RGB")`: alpha is
dropped, CMYK converted, of several frames the first one taken. The EXIF orientation is ignored, as
there, unless `exif_rotate` asks for it: published numbers were made without.
"""

import contextlib
import dataclasses
import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

RESIZES = ("squeeze", "crop")  # see `Preprocess`

_MODES = {1: "L", 3: "RGB"}  # channels -> PIL mode
_16_BITS_AS_I = ("PNG", "PPM")  # formats that PIL reads 16 bits of in its mode "I"

# What PIL's plugins raise for broken files; anything else is a defect of this project.
_PIL_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


class BadImageError(ValueError):
    """The bytes of one image cannot be decoded; the text says why, not which image it is."""


@contextlib.contextmanager
def pil_errors() -> Iterator[None]:
    """Turns what PIL raises for a broken file into BadImageError."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise BadImageError("not the bytes of an image") from error
    except _PIL_ERRORS as error:
        raise BadImageError(f"{type(error).__name__}: {error}"[:200]) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
    """What images become: uint8 [image_size, image_size, channels].

    image_size   None: each image keeps its own height and width, and `resize` is not read.
    resize       "squeeze": bilinear to the square, antialiased; an image that fits is untouched.
                 "crop": the evaluation of DeiT and torchvision, see `resize_and_crop`.
    crop_pct     share of the resized short side that "crop" keeps.
    exif_rotate  turn an image upright as its EXIF orientation says.
    """

    image_size: int | None
    channels: int
    resize: str = "squeeze"
    crop_pct: float = 0.875
    exif_rotate: bool = False

    def open(self, image: bytes | UInt8[np.ndarray, "h w c"]) -> Image.Image:
        """The whole image, loaded, in mode "L" or "RGB". Raises BadImageError."""
        if isinstance(image, np.ndarray):
            return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        return open_image(image, channels=self.channels, exif_rotate=self.exif_rotate)

    def decode(self, image: bytes) -> UInt8[np.ndarray, "h w c"]:
        """The image in this form. Raises BadImageError."""
        return self.fit(self.open(image))

    def fit(self, image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
        """An opened image, resized by `resize`, as an array."""
        size = self.image_size
        if size is None:
            return to_array(image)
        if self.resize == "crop":
            image = resize_and_crop(image, size, self.crop_pct)
        elif image.size != (size, size):
            # PIL widens the filter when it makes an image smaller: that is the antialiasing.
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return to_array(image)


def decode_image(encoded: bytes, *, image_size: int, channels: int) -> UInt8[np.ndarray, "s s c"]:
    """`Preprocess(...).decode`: an image squeezed to uint8 [image_size, image_size, channels].

    Grey is repeated over three channels; colour becomes luma in one.

    Raises:
      BadImageError: the bytes are no image, are cut short, or hold numbers without a known range.
    """
    return Preprocess(image_size=image_size, channels=channels).decode(encoded)


def to_array(image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    """The pixels of an image in mode "L" or "RGB", always with a channel axis."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def open_image(encoded: bytes, *, channels: int, exif_rotate: bool = False) -> Image.Image:
    """Encoded bytes (JPEG, PNG, ...) as a loaded PIL image in mode "L" (1 channel) or "RGB" (3).

    Raises:
      BadImageError: the bytes are no image, are cut short, hold 32-bit or float pixels, whose range
        is unknown, or more pixels than PIL accepts.
    """
    # No `draft` (JPEG decoded at 1/2 or 1/4): it moves pixels of noise and print by 1.6 grey levels
    # on average even where the halved crop is still three times as wide as the target.
    with pil_errors():
        image = Image.open(io.BytesIO(encoded))
        kind = image.format
        image.load()
        if exif_rotate:
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image, kind)
    if image.mode == _MODES[channels]:
        return image
    # Dropped with the alpha below: PIL would warn that a palette's transparency is lost.
    image.info.pop("transparency", None)
    return image.convert(_MODES[channels])


def _to_8_bits(image: Image.Image, kind: str | None) -> Image.Image:
    """16-bit grey scaled to 8 bits, where PIL would clip at 255, silently."""
    if not (image.mode.startswith("I;16") or (image.mode == "I" and kind in _16_BITS_AS_I)):
        raise BadImageError(f"mode {image.mode} has pixels without a known range")
    wide = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))


def resize_and_crop(image: Image.Image, size: int, crop_pct: float) -> Image.Image:
    """The short side resized to int(size / crop_pct), bicubic, then the centre size x size.

    Pixel-equal to torchvision's Resize and CenterCrop on PIL images (their rounding included), but
    for images over 16 times as long as wide: only the part that is kept is resized there.
    """
    width, height = image.size
    short = int(size / crop_pct)
    if width <= height:
        new = short, int(short * height / width)
    else:
        new = int(short * width / height), short
    left, top = (int(round((side - size) / 2.0)) for side in new)
    if max(new) > 16 * short:
        # 30,000 x 30 pixels would become 256,000 x 256.
        x, y = width / new[0], height / new[1]
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if new != image.size:
        image = image.resize(new, Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))
