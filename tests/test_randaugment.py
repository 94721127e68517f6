"""RandAugment rand-m9-mstd0.5-inc1 against its definition, and the speed code's reference."""

import itertools
import types
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tosa_jax.data import randaugment, speed
from tosa_jax.data.randaugment import ARGUMENTS, FILL, NAMES, OPERATIONS, draw_operations

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)
SMOOTH = (np.mgrid[:48, :64].sum(0)[..., None] * [1.0, 1.5, 2.0] + 20).astype(np.uint8)


def apply(name, argument, pixels=NOISE):
    return np.asarray(OPERATIONS[name](Image.fromarray(pixels), argument)).astype(int)


def test_the_operations_are_timms_increasing_set():
    assert set(NAMES) == {
        *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd"),
        *("Color", "Contrast", "Brightness", "Sharpness"),
        *("ShearX", "ShearY", "TranslateX", "TranslateY"),
    }
    assert NAMES == tuple(OPERATIONS)


@pytest.mark.parametrize(
    ("name", "at_9", "at_10", "at_0"),
    [
        ("Rotate", 27, 30, 0),
        ("Posterize", 1, 0, 4),
        ("Solarize", 26, 0, 256),
        ("SolarizeAdd", 99, 110, 0),
        ("Color", 1.81, 1.9, 1),
        ("Contrast", 1.81, 1.9, 1),
        ("Brightness", 1.81, 1.9, 1),
        ("Sharpness", 1.81, 1.9, 1),
        ("ShearX", 0.27, 0.3, 0),
        ("ShearY", 0.27, 0.3, 0),
        ("TranslateX", 0.405, 0.45, 0),
        ("TranslateY", 0.405, 0.45, 0),
    ],
)
def test_magnitudes(name, at_9, at_10, at_0):
    got = [ARGUMENTS[name](m, 1.0) for m in (0.9, 1.0, 0.0)]
    assert got == pytest.approx([at_9, at_10, at_0])
    other = ARGUMENTS[name](0.9, -1.0)
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        assert other == pytest.approx(0.19)
    elif name in ("Posterize", "Solarize", "SolarizeAdd"):
        assert other == at_9
    else:
        assert other == pytest.approx(-at_9)


def test_draws():
    rng = np.random.default_rng(3)
    drawn = [draw_operations(rng) for _ in range(6000)]
    numbers = Counter(map(len, drawn))
    np.testing.assert_allclose([numbers[i] / 6000 for i in range(3)], [0.25, 0.5, 0.25], atol=0.02)
    flat = [operation for operations in drawn for operation in operations]
    counts = Counter(name for name, _ in flat)
    assert counts.keys() == set(NAMES)
    assert all(abs(count / len(flat) - 1 / 15) < 0.012 for count in counts.values())
    assert any(len(o) == 2 and o[0][0] == o[1][0] for o in drawn)  # with replacement
    degrees = np.array([value for name, value in flat if name == "Rotate"])
    assert 0.4 < (degrees > 0).mean() < 0.6
    magnitudes = np.abs(degrees) / 3
    assert abs(magnitudes.mean() - 9) < 0.1 and abs(magnitudes.std() - 0.5) < 0.06
    assert magnitudes.max() == 10  # clipped


def test_operations_on_values():
    x = NOISE.astype(int)
    np.testing.assert_array_equal(apply("Invert", 0), 255 - x)
    np.testing.assert_array_equal(apply("Posterize", 1), x // 128 * 128)
    np.testing.assert_array_equal(apply("Posterize", 3), x // 32 * 32)
    assert not apply("Posterize", 0).any()
    np.testing.assert_array_equal(apply("Solarize", 26), np.where(x < 26, x, 255 - x))
    np.testing.assert_array_equal(apply("SolarizeAdd", 99), np.where(x < 128, x + 99, x))
    bright = np.clip(x * 1.81, 0, 255)
    assert np.abs(apply("Brightness", 1.81) - bright).max() <= 1
    luma = (x @ [0.299, 0.587, 0.114])[..., None]
    assert np.abs(apply("Color", 0.19) - (luma + 0.19 * (x - luma))).max() <= 1.5
    mean = int(luma.round().mean() + 0.5)
    contrast = np.clip(mean + 1.81 * (x - mean), 0, 255)
    assert np.abs(apply("Contrast", 1.81) - contrast).max() <= 2
    narrow = (60 + x // 4).astype(np.uint8)
    stretched = apply("AutoContrast", 0, narrow)
    assert stretched.min() == 0 and stretched.max() == 255
    equal = apply("Equalize", 0, (x**2 // 256).astype(np.uint8))
    assert abs(np.median(equal) - 128) < 12


@pytest.mark.parametrize("pixels", [NOISE, SMOOTH, NOISE[:, :33], NOISE[:2, :2]], ids="abcd")
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.37, 0.9, 1.0])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Sharpness"])
def test_fast_operations_equal_pils(name, share, sign, pixels):
    argument = ARGUMENTS[name](share, sign)
    image = Image.fromarray(pixels)
    want = np.asarray(speed.reference_operation(image, name, argument)).astype(int)
    off = np.abs(apply(name, argument, pixels) - want)
    assert off.max() <= 1 and (off > 0).mean() < 0.01
    if name == "Sharpness":
        assert not off.any()


def test_geometry_moves_the_right_way_and_fills_with_the_mean():
    right = apply("TranslateX", -0.25)
    np.testing.assert_array_equal(right[:, 16:], NOISE[:, :-16])
    assert (right[:, :16] == FILL).all() and FILL == (124, 116, 104)
    up = apply("TranslateY", 0.25)
    np.testing.assert_array_equal(up[:-12], NOISE[12:])
    square = np.zeros((65, 65, 3), np.uint8)
    square[10:55, 31:34] = 255  # a bar: turned anticlockwise its upper end goes left
    assert apply("Rotate", 27.0, square)[12:20, :31].any()
    turned = apply("Rotate", 27.0)
    assert (turned[0, 0] == FILL).all() and (turned[-1, -1] == FILL).all()
    sheared = apply("ShearX", 0.3)
    assert (sheared[-1, -10:] == FILL).all() and (sheared[0, :60] != FILL).any()


def test_a_large_image_keeps_its_rows_apart():
    # Blocks of rows, each with room for its own spread of shifts.
    pixels = RNG.integers(0, 256, (300, 90, 3), dtype=np.uint8)
    for argument in (0.3, -0.3):
        want = speed.reference_operation(Image.fromarray(pixels), "ShearX", argument)
        assert np.abs(apply("ShearX", argument, pixels) - np.asarray(want)).max() <= 1


def test_rand_augment_applies_what_is_drawn_in_order():
    image = Image.fromarray(NOISE)
    for seed in range(30):
        want = image
        for name, argument in draw_operations(np.random.default_rng(seed)):
            want = OPERATIONS[name](want, argument)
        got = randaugment.rand_augment(image, np.random.default_rng(seed))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("make", [speed.sample_jpegs, speed.high_frequency_jpegs])
def test_the_whole_pipeline_stays_with_the_straightforward_one(make):
    images = make(16)
    off = speed.difference(images, image_size=224)
    assert off["mean_difference"] <= 0.1 and off["difference_99th_percentile"] <= 1
    assert all(Image.open(speed.io.BytesIO(data)).size == (500, 375) for data in images)


def test_rows_of_the_measurement():
    rows = speed.measure(speed.sample_jpegs(2), image_size=32, rounds=1, accelerator_rate=1e4)
    assert [row["step"] for row in rows] == "decode crop randaugment whole reference".split()
    for row in rows:
        assert row["images_per_second_per_core"] == pytest.approx(
            1000 / row["milliseconds"], rel=0.05
        )
    whole = rows[3]
    assert whole["cores"] == np.ceil(1e4 / whole["images_per_second_per_core"])
    assert whole["speedup"] == pytest.approx(rows[4]["milliseconds"] / whole["milliseconds"], 0.01)


def test_repeats_are_measured_as_one_decoding_for_all_copies(monkeypatch):
    clock = itertools.count(step=0.001)
    worked = []

    def working(step, seconds):
        return lambda *args, **kwargs: worked.append(seconds) or step(*args, **kwargs)

    monkeypatch.setattr(
        speed, "time", types.SimpleNamespace(thread_time=lambda: next(clock) + sum(worked))
    )
    monkeypatch.setattr(speed, "open_image", working(speed.open_image, 3.0))
    monkeypatch.setattr(speed, "deit", working(speed.deit, 1.0))
    sizes = {"image_size": 32, "rounds": 1, "accelerator_rate": 10.0}
    rows = speed.measure(speed.sample_jpegs(1), repeats=3, **sizes)
    whole, repeated = rows[3], rows[5]
    assert whole["milliseconds"] == pytest.approx(4000, rel=0.01) and "cores" not in whole
    assert repeated["step"] == "repeated" and repeated["cores"] == 21
    assert repeated["milliseconds"] == pytest.approx((3000 + 3 * 1000) / 3, rel=0.01)


def test_measuring_a_config(digits_dir):
    config = speed.DataConfig(name="digits", data_dir=digits_dir, image_size=8, channels=1)
    assert len(speed.measure_config(config, count=3, rounds=1)) == 5
