"""Depth augmentation: each step by its definition, and a picture that stays with its depth."""

import itertools
import math

import numpy as np
import pytest

from tosa_jax.data.decoding import BadImageError
from tosa_jax.data.depth import transforms as depth_transforms
from tosa_jax.data.depth.transforms import (
    DEPTH_AUGMENTATIONS,
    DepthAugment,
    change_colours,
    place_crop,
    rotate,
    trust_box,
)

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
DEPTH = RNG.uniform(1, 9, (40, 60)).astype(np.float32)


def located() -> dict:
    """An example whose picture and depth both tell where a pixel came from: red its row, green its column."""
    rows, columns = np.mgrid[:80, :120].astype(np.float32)
    image = np.stack([2 * rows + 20, 2 * columns + 10, np.full_like(rows, 255)], -1)
    return {"image": image.astype(np.uint8), "depth": 1 + rows + 1000 * columns}


def sources_of(height: int, width: int, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns, of pixel centres, that a turn anticlockwise about the middle fetches each pixel from."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    down, right = rows - height / 2, columns - width / 2
    angle = math.radians(degrees)
    return (
        math.sin(angle) * right + math.cos(angle) * down + height / 2 - 0.5,
        math.cos(angle) * right - math.sin(angle) * down + width / 2 - 0.5,
    )


@pytest.mark.parametrize("degrees", [2.5, -1.7])
def test_rotation_of_depth_takes_the_nearest_pixel(degrees):
    _, turned = rotate(IMAGE, DEPTH, degrees)
    rows, columns = sources_of(40, 60, degrees)
    near_rows, near_columns = np.rint(rows).astype(int), np.rint(columns).astype(int)
    within = (near_rows >= 0) & (near_rows < 40) & (near_columns >= 0) & (near_columns < 60)
    wanted = np.where(within, DEPTH[near_rows.clip(0, 39), near_columns.clip(0, 59)], 0)
    # Halfway between two pixels either is the nearest.
    clear = (np.abs(rows % 1 - 0.5) > 0.01) & (np.abs(columns % 1 - 0.5) > 0.01)
    assert clear.mean() > 0.9 and (~within).sum() > 20
    np.testing.assert_array_equal(turned[clear], wanted[clear])
    assert turned.dtype == np.float32 and set(np.unique(turned)) <= {*np.unique(DEPTH), 0}


@pytest.mark.parametrize("degrees", [2.5, -1.7])
def test_rotation_of_the_picture_is_bilinear(degrees):
    turned, _ = rotate(IMAGE, DEPTH, degrees)
    rows, columns = sources_of(40, 60, degrees)
    inner = (rows > 1) & (rows < 38) & (columns > 1) & (columns < 58)
    rows, columns = rows[inner], columns[inner]
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    wanted = 0
    for down, right in itertools.product((0, 1), (0, 1)):
        weight = np.abs(1 - down - rows % 1) * np.abs(1 - right - columns % 1)
        wanted = wanted + weight[:, None] * IMAGE[top + down, left + right]
    assert np.abs(turned[inner] - wanted).max() < 1.01
    grey, _ = rotate(IMAGE[..., :1], DEPTH, degrees)
    np.testing.assert_array_equal(grey, turned[..., :1])


@pytest.mark.parametrize("augment", ["flip", "nyu"])
def test_picture_and_depth_move_together(augment, monkeypatch):
    monkeypatch.setattr(depth_transforms, "_COLOUR_SHARE", 0.0)
    seen = set()
    for seed in range(12):
        transform = DepthAugment((48, 64), augment)
        out = transform.random_map(located(), np.random.default_rng(seed))
        assert out["image"].shape == (48, 64, 3) and out["depth"].shape == (48, 64)
        assert out["image"].dtype == np.uint8 and out["depth"].dtype == np.float32
        valid = out["depth"] > 0
        assert valid.mean() > 0.9
        columns, rows = np.divmod(out["depth"] - 1, 1000)
        off_rows = np.abs((out["image"][..., 0] - 20.0) / 2 - rows)
        off_columns = np.abs((out["image"][..., 1] - 10.0) / 2 - columns)
        whole = valid & (out["image"][..., 2] == 255)  # not mixed with what comes from outside
        assert whole.mean() > 0.9
        assert max(off_rows[whole].max(), off_columns[whole].max()) <= (
            0 if augment == "flip" else 1.01
        )
        seen.add(bool(columns[24, 10] > columns[24, 50]))
    assert seen == {False, True}  # flipped and not


def test_flip_is_drawn_every_second_time():
    transform = DepthAugment((80, 120), "flip")
    flipped = 0
    for seed in range(200):
        out = transform.random_map(located(), np.random.default_rng(seed))
        if out["depth"][0, 0] != 1:
            np.testing.assert_array_equal(out["depth"], located()["depth"][:, ::-1])
            np.testing.assert_array_equal(out["image"], located()["image"][:, ::-1])
            flipped += 1
    assert 75 < flipped < 125


def test_what_is_drawn_fills_its_range_and_nothing_else(monkeypatch):
    drawn = {"degrees": [], "gamma": [], "brightness": [], "colour": []}

    def rotated(image, depth, degrees):
        drawn["degrees"].append(degrees)
        return image, depth

    def coloured(image, *, gamma, brightness, colour):
        for name, value in (("gamma", gamma), ("brightness", brightness)):
            drawn[name].append(value)
        assert colour.shape == (3,)
        drawn["colour"] += colour.tolist()
        return image

    monkeypatch.setattr(depth_transforms, "rotate", rotated)
    monkeypatch.setattr(depth_transforms, "change_colours", coloured)
    transform = DepthAugment((48, 64), "nyu")
    rng = np.random.default_rng(0)
    for _ in range(400):
        transform.random_map(located(), rng)
    ranges = {
        "degrees": (-2.5, 2.5),
        "gamma": (0.9, 1.1),
        "brightness": (0.75, 1.25),
        "colour": (0.9, 1.1),
    }
    for name, (low, high) in ranges.items():
        values = np.array(drawn[name])
        margin = 0.05 * (high - low)
        assert low <= values.min() < low + margin and high - margin < values.max() <= high, name
        assert abs(values.mean() - (low + high) / 2) < 2 * margin
    assert len(drawn["degrees"]) == 400 and 160 < len(drawn["gamma"]) < 240


def test_crops_are_uniform_over_all_places():
    rng = np.random.default_rng(0)
    places = [place_crop((5, 7), (4, 5), rng) for _ in range(1200)]
    counts = {place: places.count(place) for place in set(places)}
    assert set(counts) == set(itertools.product((0, 1), (0, 1, 2)))
    assert min(counts.values()) > 150
    assert place_crop((10, 20), (4, 5), None) == (3, 7)
    with pytest.raises(BadImageError, match="5x7 pixels are smaller than image_size=6x7"):
        place_crop((5, 7), (6, 7), rng)


def test_none_is_the_central_crop():
    out = DepthAugment((48, 64), "none").random_map(located(), np.random.default_rng(1))
    np.testing.assert_array_equal(out["depth"], located()["depth"][16:64, 28:92])
    np.testing.assert_array_equal(out["image"], located()["image"][16:64, 28:92])


@pytest.mark.parametrize(("gamma", "brightness"), [(0.9, 1.25), (1.1, 0.75), (1.0, 1.0)])
def test_colours_by_their_formula(gamma, brightness):
    colour = np.array([0.9, 1.0, 1.1])
    out = change_colours(IMAGE, gamma=gamma, brightness=brightness, colour=colour)
    wanted = np.clip((IMAGE / 255) ** gamma * brightness * colour, 0, 1) * 255
    assert out.dtype == np.uint8 and np.abs(out - wanted).max() <= 0.5 + 1e-9
    assert np.abs(out.astype(int) - IMAGE).max() > 10


def test_a_whole_image_keeps_its_pixels_and_loses_the_depth_of_the_border():
    image, depth = trust_box(IMAGE, DEPTH, (40, 60), (5, 38, 4, 50))
    np.testing.assert_array_equal(image, IMAGE)
    inside = np.zeros((40, 60), bool)
    inside[5:38, 4:50] = True
    np.testing.assert_array_equal(depth, np.where(inside, DEPTH, 0))
    assert (DEPTH > 0).all()  # the caller's own is left alone


def test_a_larger_image_is_cut_to_the_box():
    image, depth = trust_box(IMAGE, DEPTH, (20, 30), (5, 38, 4, 50))
    np.testing.assert_array_equal(image, IMAGE[5:38, 4:50])
    np.testing.assert_array_equal(depth, DEPTH[5:38, 4:50])
    with pytest.raises(BadImageError, match="reaches out of 40x60 pixels"):
        trust_box(IMAGE, DEPTH, (20, 30), (5, 41, 4, 50))
    box = (10, 70, 20, 100)
    for seed in range(5):
        out = DepthAugment((40, 50), "flip", box).random_map(located(), np.random.default_rng(seed))
        columns, rows = np.divmod(out["depth"] - 1, 1000)
        assert rows.min() >= 10 and rows.max() < 70 and columns.min() >= 20 and columns.max() < 100


def test_every_augmentation_leaves_its_input_alone():
    for name in DEPTH_AUGMENTATIONS:
        example = located()
        for array in example.values():
            array.flags.writeable = False
        for seed in range(4):
            out = DepthAugment((80, 120), name, (1, 79, 1, 119)).random_map(
                example | {"file": "x"}, np.random.default_rng(seed)
            )
            assert out["file"] == "x" and out["image"].flags.c_contiguous
