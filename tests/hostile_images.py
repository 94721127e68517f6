"""Images for `tests.hostile`: small whole files, how they are read, and files made to do harm."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.hostile_format import Bytes, Format, zeros


def encoded(mode: str, form: str, **options: Any) -> bytes:
    """A picture of 24x17 pixels in a format of Pillow."""
    noise = np.random.default_rng(1).integers(0, 256, (17, 24, 4), np.uint8)
    noise[:8] = 90
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 200)
    else:
        image = Image.fromarray(noise[..., :3]).convert(mode)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, data: bytes, extra: bytes = b"") -> bytes:
    """A grey PNG file with such pixels, compressed already."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def sealed_png(data: bytes, rng: np.random.Generator, change: Bytes) -> bytes:
    """A PNG file in which a chunk is damaged and its checksum right, or the bytes are."""
    if rng.random() < 0.4:
        return change(data, rng)
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    i = int(rng.integers(len(chunks)))
    chunks[i] = (chunks[i][0], change(chunks[i][1] or b"\0", rng))
    return data[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)


def many_scans(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG file of so many scans, each over the whole picture."""
    data = encoded("L", "JPEG", progressive=True)
    start = data.index(b"\xff\xc2") + 5
    data = data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]
    scan = data.rindex(b"\xff\xda")
    return data[:scan] + data[scan:-2] * scans + data[-2:]


def sized_jpeg(width: int, height: int) -> bytes:
    """A JPEG file whose header says another size than it has."""
    data = encoded("RGB", "JPEG")
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def read_image(content: bytes, _: Path) -> None:
    from tosa_jax.data.decoding import Preprocess

    for channels, rotate in ((3, True), (1, False)):
        form = Preprocess(image_size=16, channels=channels, exif_rotate=rotate)
        array = form.decode(content)
        assert array.shape == (16, 16, channels) and array.dtype == np.uint8


def read_depth(content: bytes, folder: Path) -> None:
    from tosa_jax.data.depth.maps import depth_of_png

    depth = depth_of_png(content, 1000.0)
    assert depth.ndim == 2 and depth.dtype == np.float32 and np.isfinite(depth).all()
    read_image(content, folder)


IMAGE_BOMBS = (
    sized_jpeg(65500, 65500),
    sized_jpeg(13000, 13000),
    many_scans(8000, 8000, 2000),
    png_of(2**31 - 1, 2**31 - 1, zlib.compress(b"")),
    png_of(100_000, 100_000, zeros(2000, 15)),
    png_of(13_000, 13_000, zeros(162, 15)),
    png_of(8, 8, zeros(3000, 15)),
    png_of(8, 8, zlib.compress(bytes(72)), png_chunk(b"zTXt", b"a\0\0" + zeros(2000, 15))),
    png_of(8, 8, zlib.compress(bytes(72)), png_chunk(b"iCCP", b"a\0\0" + zeros(2000, 15))),
    png_of(8, 8, zlib.compress(bytes(72)), png_chunk(b"zTXt", b"a\0\0" + zeros(1, 15)) * 500),
    b"P6 100000 100000 255\n",
    b"P5 13000 13000 65535\n" + bytes(100),
    b"GIF89a"
    + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    + b","
    + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(touched) (w) file closefile\n%%EOF\n",
    b"",
    b"<html></html>",
)


def images() -> Format:
    samples = [
        encoded("RGB", "JPEG"), encoded("L", "JPEG", progressive=True), encoded("CMYK", "JPEG"),
        encoded("RGB", "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    ]  # fmt: skip
    return Format(samples, read_image, 20, IMAGE_BOMBS)


def pngs() -> Format:
    forms = [encoded("RGB", "PNG"), encoded("P", "PNG", transparency=3), encoded("LA", "PNG")]
    return Format([*forms, encoded("1", "PNG")], read_image, 12, mutate=sealed_png)


def deep_pngs() -> Format:
    return Format([encoded("I;16", "PNG")], read_depth, 8, mutate=sealed_png)


def other_images() -> Format:
    samples = [
        encoded("RGB", "BMP"),
        encoded("RGB", "WEBP"),
        encoded("P", "GIF"),
        encoded("L", "PPM"),
    ]
    samples += [encoded("RGB", "TIFF", compression=x) for x in (None, "tiff_lzw", "jpeg")]
    return Format([*samples, encoded("I;16", "TIFF")], read_image, 10)
