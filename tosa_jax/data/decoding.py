"""Encoded images of any format and size -> uint8 arrays of the size a model takes.

Pixels are those that torchvision and timm train on, `Image.open(file).convert("RGB")`: alpha is
dropped, CMYK is converted, and of several frames the first is taken. The EXIF orientation is
ignored, as published results ignore it, unless `exif_rotate` is set.
"""

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from tosa_jax.errors import ConfigError, one_line

RESIZES = ("squeeze", "crop", "squash")  # see `Preprocess`

INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
"""How "crop" and "squash" resize; PIL widens its filter when it makes an image smaller."""

_MODES = {1: "L", 3: "RGB"}  # channels -> PIL mode
_16_BITS_AS_I = ("PNG", "PPM")  # formats whose 16-bit pixels PIL reads in its 32-bit mode "I"

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF")
"""The formats that are read, by Pillow's names. It knows more: for EPS it starts another program."""

MOST_PIXELS = 2**31
"""Most pixels of all scans of a JPEG file together. A progressive file has about ten scans; one made to take hours has
thousands. Of other images Pillow limits the pixels: 179 million."""


class BadImageError(ValueError):
    """One image cannot be decoded. The text says why, in one line; whoever catches it adds which image it is."""

    def __init__(self, why: str) -> None:
        super().__init__(one_line(why))


@contextlib.contextmanager
def pil_errors() -> Iterator[None]:
    """Turns what PIL raises for a broken file into BadImageError. Nothing but calls of PIL belongs in this context."""
    try:
        yield
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError("not the bytes of an image") from error
    except Exception as error:  # a plugin stumbles over a broken file in any way
        raise BadImageError(f"{type(error).__name__}: {error}"[:200]) from error


def load(encoded: bytes) -> Image.Image:
    """Decodes bytes with Pillow: one of `FORMATS`, with its pixels loaded. Raises BadImageError."""
    with pil_errors():
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        if image.format in ("JPEG", "MPO"):  # two of one are MPO
            scans = encoded.count(b"\xff\xda")
            if scans * image.width * image.height > MOST_PIXELS:
                raise BadImageError(f"{scans} scans of {image.width}x{image.height} pixels")
        image.load()
    return image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How whole images become uint8 [image_size, image_size, channels], or [height, width, channels].

    image_size   side of the square, or (height, width), pixels. None: images keep their height and width, or their
                 proportion alone (`max_patches`), and `resize` and `crop_pct` are not used.
    channels     1: grey; colours become luma. 3: RGB; grey is repeated.
    resize       "squeeze": resized to the square, bilinear and antialiased, whatever the aspect
                 ratio. "crop": DeiT's and torchvision's evaluation, see `resize_and_crop`.
                 "squash", as timm's and transformers': both sides are resized by `interpolation`,
                 whatever the aspect ratio, and the centre is kept.
    crop_pct     share of the resized short side that "crop" keeps, of both that "squash" keeps,
                 in (0, 1].
    interpolation  of "crop" and "squash", and with `max_patches`: a key of `INTERPOLATIONS`.
    exif_rotate  whether an image is turned upright as its EXIF orientation says.
    max_patches  above 0, without an `image_size`: images become whole patches of `patch_size` pixels, at most so many
                 of them, as `size_of_patches` says.

    Raises ConfigError for other values.
    """

    image_size: int | tuple[int, int] | None
    channels: int
    resize: str = "squeeze"
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    exif_rotate: bool = False
    max_patches: int = 0
    patch_size: int = 0

    def __post_init__(self) -> None:
        size = self.image_size
        sides = size if isinstance(size, tuple) and len(size) == 2 else (size,)
        if size is not None and not all(type(x) is int and 0 < x < 2**16 for x in sides):
            raise ConfigError(
                f"image_size={size!r} must be a number of pixels, (height, width), or None"
            )
        patches = (self.max_patches, self.patch_size)
        whole = all(type(x) is int and 0 < x < 2**16 for x in patches)
        if self.max_patches and (size is not None or not whole):
            raise ConfigError(
                f"max_patches={self.max_patches!r} and patch_size={self.patch_size!r} must be whole numbers above 0, "
                "with image_size=None"
            )
        # Images of other numbers of channels come as arrays: no file is made one.
        countable = type(self.channels) is int and 0 < self.channels < 2**16
        if not countable or self.resize not in RESIZES:
            raise ConfigError(f"channels={self.channels!r} and resize={self.resize!r} are unknown")
        if self.interpolation not in INTERPOLATIONS or not 0 < self.crop_pct <= 1:
            raise ConfigError(
                f"interpolation={self.interpolation!r} and crop_pct={self.crop_pct!r} are unknown"
            )

    def open(self, image: bytes | UInt8[np.ndarray, "h w c"]) -> Image.Image:
        """The whole image as a loaded PIL image in mode "L" or "RGB". Raises BadImageError."""
        if isinstance(image, np.ndarray):
            return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        return open_image(image, channels=self.channels, exif_rotate=self.exif_rotate)

    def decode(self, image: bytes) -> UInt8[np.ndarray, "h w c"]:
        """Decodes and resizes an encoded image. Raises BadImageError."""
        return self.fit(self.open(image))

    def fit(self, image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
        """Resizes a PIL image in mode "L" or "RGB" and returns its pixels."""
        size = self.image_size
        if self.max_patches:
            tall, wide = size_of_patches(
                image.height, image.width, self.patch_size, self.max_patches
            )
            return to_array(image.resize((wide, tall), INTERPOLATIONS[self.interpolation]))
        if size is None:
            return to_array(image)
        height, width = (size, size) if isinstance(size, int) else size
        if self.resize == "crop":
            image = resize_and_crop(image, size, self.crop_pct, self.interpolation)
        elif self.resize == "squash":
            whole = int(width / self.crop_pct), int(height / self.crop_pct)
            image = image.resize(whole, INTERPOLATIONS[self.interpolation])
            left, top = (
                int(round((a - b) / 2.0)) for a, b in zip(whole, (width, height), strict=True)
            )
            image = image.crop((left, top, left + width, top + height))
        elif image.size != (width, height):
            # Antialiased: PIL widens its filter when it makes an image smaller.
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return to_array(image)


def to_array(image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    """The pixels of a PIL image in mode "L" or "RGB"; c is 1 or 3."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def open_image(encoded: bytes, *, channels: int, exif_rotate: bool = False) -> Image.Image:
    """Decodes bytes (JPEG, PNG, ...) to a loaded PIL image in mode "L" (1 channel) or "RGB" (3).

    Raises:
      BadImageError: the bytes are no image, are cut short, hold 32-bit or float pixels, whose range
        is unknown, or more pixels than PIL accepts.
    """
    # Not `Image.draft` (JPEG decoded at 1/2 or 1/4 of its size): for noise and print it changes
    # pixels by 1.6 grey levels on average, even if the halved crop is three times the target size.
    image = load(encoded)
    file_format = image.format
    if exif_rotate:
        with pil_errors():
            image = ImageOps.exif_transpose(image)
    return in_mode_of(image, channels, file_format)


def in_mode_of(image: Image.Image, channels: int, file_format: str | None = None) -> Image.Image:
    """A loaded PIL image in mode "L" (1 channel) or "RGB" (3), whatever its own is.

    file_format  of the file that it was read from, for 16-bit pixels that PIL reads as 32 bits.

    Raises BadImageError: 32-bit or float pixels, whose range is unknown.
    """
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image, file_format)
    if image.mode == _MODES[channels]:
        return image
    # The transparency of a palette is dropped, as alpha is; with the entry, PIL would warn.
    image.info.pop("transparency", None)
    return image.convert(_MODES[channels])


def _to_8_bits(image: Image.Image, file_format: str | None) -> Image.Image:
    """Scales 16-bit grey to 8 bits. PIL itself would clip at 255 without a word."""
    if not (image.mode.startswith("I;16") or (image.mode == "I" and file_format in _16_BITS_AS_I)):
        raise BadImageError(f"mode {image.mode} has pixels without a known range")
    return Image.fromarray(from_16_bits(np.asarray(image)))


def from_16_bits(wide: np.ndarray) -> UInt8[np.ndarray, "..."]:
    """Integers in [0, 65535] as the nearest of 0 to 255."""
    return _NEAREST_8_BITS[wide]


# A table: arithmetic on 100 million pixels would take gigabytes.
_NEAREST_8_BITS = ((np.arange(2**16) * 255 + 32767) // 65535).astype(np.uint8)


def resize_and_crop(
    image: Image.Image,
    size: int | tuple[int, int],
    crop_pct: float,
    interpolation: str = "bicubic",
) -> Image.Image:
    """Resizes the short side to int(size / crop_pct), and keeps the central size x size pixels.

    Equal, pixel for pixel, to torchvision's Resize and CenterCrop of PIL images. Only of images
    more than 16 times as long as wide, just the kept part is resized: the whole would be huge.
    With a size of (height, width) the image is made just large enough for both.
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    tall, wide = int(rows / crop_pct), int(columns / crop_pct)
    (width, height), resample = image.size, INTERPOLATIONS[interpolation]
    if width * tall <= height * wide:
        new = wide, int(wide * height / width)
    else:
        new = int(tall * width / height), tall
    left, top = (int(round((a - b) / 2.0)) for a, b in zip(new, (columns, rows), strict=True))
    if max(new) > 16 * max(tall, wide):
        # 30,000 x 30 pixels would become 256,000 x 256 first.
        x, y = width / new[0], height / new[1]
        box = (left * x, top * y, (left + columns) * x, (top + rows) * y)
        return image.resize((columns, rows), resample, box=box)
    if new != image.size:
        image = image.resize(new, resample)
    return image.crop((left, top, left + columns, top + rows))


def size_of_patches(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """Height and width, pixels, that an image of `height` and `width` is resized to: at most `max_patches` patches.

    Its proportion is kept as nearly as whole patches allow, and it is made larger where it has fewer patches. Source:
    `get_image_size_for_max_num_patches` of transformers' Siglip2ImageProcessor, whose search this is.
    """

    def scaled(scale: float) -> tuple[int, int]:
        return (
            max(patch_size, math.ceil(height * scale / patch_size) * patch_size),
            max(patch_size, math.ceil(width * scale / patch_size) * patch_size),
        )

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        scale = (low + high) / 2
        tall, wide = scaled(scale)
        fits = tall * wide <= max_patches * patch_size**2
        low, high = (scale, high) if fits else (low, scale)
    return scaled(low)
