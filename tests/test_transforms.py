"""Decoding of whatever a folder holds, and the transforms against their definitions and PIL."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tosa_jax.data.decoding import (
    BadImageError,
    Preprocess,
    open_image,
    resize_and_crop,
)
from tosa_jax.data.transforms import (
    CROPS,
    draw_crop,
    make_augmentation,
    random_resized_crop,
    shift_image,
    warp_image,
)

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def pixels(data: bytes, channels: int = 3, **options) -> np.ndarray:
    return np.asarray(open_image(data, channels=channels, **options))


def squeezed(data: bytes, image_size: int, channels: int) -> np.ndarray:
    return Preprocess(image_size=image_size, channels=channels).decode(data)


def test_decoding():
    colour = np.zeros((4, 4, 3), np.uint8)
    colour[..., 0] = 200
    np.testing.assert_array_equal(squeezed(encoded(colour), image_size=4, channels=3), colour)
    assert (squeezed(encoded(colour), image_size=4, channels=1) == 60).all()  # 0.299 * 200
    # Antialiased: single-pixel stripes become their mean; plain bilinear would alias.
    stripes = np.zeros((32, 32), np.uint8)
    stripes[:, ::4] = 200
    small = squeezed(encoded(stripes), image_size=8, channels=1)
    assert abs(small[2:-2, 2:-2].astype(int) - 50).max() <= 15


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled(kind):
    ramp = np.linspace(0, 65535, 1200).round().astype(np.uint16).reshape(30, 40)
    got = pixels(encoded(ramp, kind), channels=1)
    assert np.abs(got - ramp / 257.0).max() <= 0.5
    assert (pixels(encoded(ramp, kind)) == got[..., None]).all()


def test_grey_bilevel_palette_and_alpha():
    grey = COLOUR[..., 0]
    assert (pixels(encoded(grey)) == grey[..., None]).all()
    bilevel = Image.fromarray(grey).convert("1")
    assert set(np.unique(pixels(encoded(bilevel)))) == {0, 255}
    palette = Image.fromarray(COLOUR).quantize(16)
    plain = np.asarray(palette.convert("RGB"))
    clear = encoded(palette, transparency=bytes(range(0, 160, 10)))
    np.testing.assert_array_equal(pixels(encoded(palette)), plain)
    np.testing.assert_array_equal(pixels(clear), plain)  # and no warning
    np.testing.assert_array_equal(pixels(encoded(palette, transparency=3)), plain)
    rgba = np.concatenate([COLOUR, COLOUR[..., :1]], axis=2)
    np.testing.assert_array_equal(pixels(encoded(rgba)), COLOUR)
    np.testing.assert_array_equal(pixels(encoded(COLOUR, transparency=(1, 2, 3))), COLOUR)


def test_cmyk_has_the_right_colours():
    red = Image.new("RGB", (16, 16), (230, 20, 30))
    got = pixels(encoded(red.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(got.astype(int) - (230, 20, 30)).max() <= 4


def test_exif_is_ignored_unless_asked_for():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    data = encoded(COLOUR, exif=exif)
    np.testing.assert_array_equal(pixels(data), COLOUR)
    np.testing.assert_array_equal(pixels(data, exif_rotate=True), np.rot90(COLOUR, -1))
    upright = Preprocess(image_size=8, channels=3, exif_rotate=True).decode(data)
    want = Preprocess(image_size=8, channels=3).decode(encoded(np.rot90(COLOUR, -1).copy()))
    np.testing.assert_array_equal(upright, want)


@pytest.mark.parametrize("size", [(1, 1), (30_000, 1), (30_000, 30), (1, 3000)])
@pytest.mark.parametrize("resize", ["squeeze", "crop"])
def test_extreme_sizes(size, resize):
    data = encoded(Image.new("RGB", size, (10, 200, 30)))
    form = Preprocess(image_size=24, channels=3, resize=resize)
    assert (form.decode(data) == (10, 200, 30)).all()
    for name in CROPS:
        element = {"image": form.open(data)}
        out = make_augmentation(name, 24).random_map(element, np.random.default_rng(0))["image"]
        assert out.shape == (24, 24, 3) and out.dtype == np.uint8


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_what_cannot_be_decoded_is_a_bad_image():
    jpeg = encoded(COLOUR, "JPEG")
    png = encoded(COLOUR)
    huge = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    bad = {
        "empty": b"",
        "text": b"<html>not found</html>",
        "cut jpeg": jpeg[: len(jpeg) * 2 // 3],
        "cut header": jpeg[:30],
        "cut png": png[: len(png) // 2],
        "broken png": png[:60] + bytes([png[60] ^ 255]) + png[61:],
        "bomb": png[:8] + png_chunk(b"IHDR", huge) + png_chunk(b"IEND", b""),
        "float": encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
        "int32": encoded(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"),
    }
    for name, data in bad.items():
        with pytest.raises(BadImageError):
            print(name, pixels(data).shape)


def torchvision_eval(image: Image.Image, size: int, short: int) -> Image.Image:
    """Resize(short, BICUBIC), CenterCrop(size), after torchvision's functional.py."""
    width, height = image.size
    if width <= height:
        new = (short, int(short * height / width))
    else:
        new = (int(short * width / height), short)
    if image.size != new:
        image = image.resize(new, Image.Resampling.BICUBIC)
    top = int(round((new[1] - size) / 2.0))
    left = int(round((new[0] - size) / 2.0))
    return image.crop((left, top, left + size, top + size))


@pytest.mark.parametrize(
    "size", [(500, 375), (375, 500), (333, 500), (256, 256), (224, 224), (257, 301), (90, 60)]
)
def test_evaluation_is_pixel_equal_to_resize_and_centre_crop(size):
    image = Image.fromarray(RNG.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    for target, crop_pct, short in ((224, 0.875, 256), (384, 0.875, 438), (384, 1.0, 384)):
        got = resize_and_crop(image, target, crop_pct)
        np.testing.assert_array_equal(
            np.asarray(got), np.asarray(torchvision_eval(image, target, short))
        )


def test_the_short_way_for_long_images_gives_the_same_pixels():
    image = Image.fromarray(RNG.integers(0, 256, (40, 680, 3), dtype=np.uint8))
    got = np.asarray(resize_and_crop(image, 56, 0.875)).astype(int)
    want = np.asarray(torchvision_eval(image, 56, 64)).astype(int)
    assert np.abs(got - want).max() <= 1


def test_crops_have_the_areas_and_ratios_of_the_definition():
    rng = np.random.default_rng(1)
    boxes = np.array([draw_crop(400, 400, rng) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes.max() <= 400
    area, ratio = width * height / 400**2, np.log(width / height)
    assert 0.075 < area.min() < 0.1 and area.max() > 0.93
    # Uniform but for tries that did not fit: only those reach over 3/4 of the area.
    small = area[area < 0.7]
    np.testing.assert_allclose(
        np.quantile(small, [0.25, 0.5, 0.75]), [0.235, 0.39, 0.545], atol=0.02
    )
    limit = np.log(4 / 3)
    assert np.abs(ratio).max() < limit + 0.02 and abs(ratio.mean()) < 0.01
    assert abs(np.abs(ratio[area < 0.7]).mean() - limit / 2) < 0.01  # log-uniform
    assert abs(boxes[:, 0].mean() - (400 - width).mean() / 2) < 4
    # Where nothing fits: the centre, at the nearest ratio.
    assert draw_crop(1000, 10, rng) == (493, 0, 506, 10)
    assert draw_crop(10, 1000, rng) == (0, 493, 10, 506)


def test_a_random_resized_crop_sees_only_its_part():
    image = Image.fromarray(RNG.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    got = random_resized_crop(image, 32, np.random.default_rng(5))
    box = draw_crop(120, 90, np.random.default_rng(5))
    want = image.crop(box).resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_crop_flip_flips_half():
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1)))
    rng = np.random.default_rng(0)
    flips = 0
    for _ in range(400):
        out = make_augmentation("crop_flip", 16).random_map({"image": ramp}, rng)["image"]
        assert out.shape == (16, 16, 1)
        flips += int(out[8, 0, 0]) > int(out[8, -1, 0])
    assert 160 < flips < 240


def bright_pixel(size: int = 17) -> np.ndarray:
    image = np.zeros((size, size, 1), np.uint8)
    image[size // 2, size // 2] = 255
    return image


def test_shift_image():
    image = np.arange(1, 10, dtype=np.uint8).reshape(3, 3, 1)
    np.testing.assert_array_equal(
        shift_image(image, 1, -1)[..., 0], [[0, 0, 0], [2, 3, 0], [5, 6, 0]]
    )
    np.testing.assert_array_equal(shift_image(image, 0, 0), image)


def test_shift_moves_at_most_an_eighth_and_that_far():
    rng, spots = np.random.default_rng(0), []
    for _ in range(300):
        moved = make_augmentation("shift", 8).random_map({"image": bright_pixel()}, rng)["image"]
        assert moved.sum() == 255
        spots.append(np.argwhere(moved[..., 0])[0] - 8)
    assert np.unique(spots, axis=0).shape == (25, 2)  # -2..2 each way, for a side of 17
    assert np.abs(spots).max() == 2


def test_shift_flip_flips_half():
    rng = np.random.default_rng(0)
    image = np.zeros((8, 8, 1), np.uint8)
    image[3:5, 2:4], image[3:5, 4:6] = 100, 200
    flips = 0
    for _ in range(400):
        moved = make_augmentation("shift_flip", 8).random_map({"image": image}, rng)["image"]
        flips += np.argwhere(moved == 200)[:, 1].mean() < np.argwhere(moved == 100)[:, 1].mean()
    assert 160 < flips < 240


def test_warp_is_the_identity_a_shift_and_a_rotation():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 1), dtype=np.uint8)
    still = {"down": 0.0, "right": 0.0, "degrees": 0.0, "scale": 1.0}
    np.testing.assert_array_equal(warp_image(image, **still), image)
    moved = warp_image(image, **(still | {"down": 2.0, "right": -1.0}))
    np.testing.assert_array_equal(moved, shift_image(image, 2, -1))
    turned = warp_image(image, **(still | {"degrees": 90.0}))
    off = turned.astype(int) - np.rot90(image)
    assert np.abs(off[1:-1, 1:-1]).max() <= 1  # PIL rounds down
    colour = np.repeat(image, 3, axis=2)
    tilted = warp_image(colour, **(still | {"degrees": 7.0}))
    assert tilted.shape == (8, 8, 3) and (tilted[..., 0] == tilted[..., 2]).all()
    square = np.zeros((40, 40, 1), np.uint8)
    square[10:30, 10:30] = 255
    grown = warp_image(square, **(still | {"scale": 1.1}))
    assert abs((grown > 127).sum() / 400 - 1.21) < 0.05


def test_shift_rotate_stays_within_its_bounds():
    rng = np.random.default_rng(0)
    for _ in range(300):
        moved = make_augmentation("shift_rotate", 8).random_map({"image": bright_pixel()}, rng)[
            "image"
        ]
        spots = np.argwhere(moved[..., 0])
        assert np.abs(spots - 8).max() <= 3  # an eighth of 17, and bilinear smear
