"""Pictures of depth: the 16-bit file, the colours, the panel."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tosa_jax.reporting.figures import colour_map, depth_panel, save_depth_png

GRID, PATCH = (2, 3), 112  # 336 // 3 pixels a patch
HEIGHT, WIDTH = GRID[0] * PATCH, GRID[1] * PATCH


def panel(drawn: np.ndarray, column: int) -> np.ndarray:
    """10 pixels between panels, 30 above them."""
    left = 10 + column * (WIDTH + 10)
    return drawn[30 : 30 + HEIGHT, left : left + WIDTH]


def draw(depth, truth=None, **more) -> np.ndarray:
    images = np.full((*depth.shape, 3), 100, np.uint8)
    return depth_panel(
        images, depth, truth=truth, **({"grid": GRID, "num_prefix_tokens": 1} | more)
    )


def test_depth_survives_the_16_bit_file(tmp_path: Path) -> None:
    metres = np.array([[0.0, 0.0014, 1.2346, 9.999], [np.nan, -1.0, np.inf, 70.0]], np.float32)
    save_depth_png(tmp_path / "a.png", metres)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "I;16"
        assert np.asarray(image).tolist() == [[0, 1, 1235, 9999], [0, 0, 0, 65535]]
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_colours_go_from_blue_to_red_and_stay_inside() -> None:
    drawn = colour_map(np.array([[-5.0, 1.0, 2.0, 3.0, 50.0]], np.float32), 1.0, 3.0).astype(int)
    assert (drawn[0, 0] == drawn[0, 1]).all() and (drawn[0, 3] == drawn[0, 4]).all()
    assert drawn[0, 1, 2] > drawn[0, 1, 0] and drawn[0, 3, 0] > drawn[0, 3, 2]
    assert drawn[0, 2, 1] > max(drawn[0, 1, 1], drawn[0, 3, 1])
    flat = colour_map(np.full((1, 1), 2.0, np.float32), 2.0, 2.0)
    assert (flat[0, 0] == colour_map(np.zeros((1, 1), np.float32), 0.0, 1.0)[0, 0]).all()


def test_columns_are_input_truth_depth_error_and_selections() -> None:
    truth = np.linspace(1, 4, 6, dtype=np.float32).reshape(1, 2, 3)
    drawn = draw(truth, truth, selections=[np.array([[0, 2, 6]], np.int32)])
    assert (panel(drawn, 0) == 100).all()
    assert (panel(drawn, 1) == panel(drawn, 2)).all()
    assert (panel(drawn, 3) == colour_map(np.zeros((1, 1), np.float32), 0, 0.5)).all()
    shown = panel(drawn, 4)
    kept = [(shown[y, x] == 100).all() for y in (56, 168) for x in (56, 168, 280)]
    assert kept == [False, True, False, False, False, True]
    assert drawn.shape[1] == 10 + 5 * (WIDTH + 10)


def test_truth_and_depth_share_their_colours_and_a_hole_is_grey() -> None:
    truth = np.array([[[1.0, 2.0, 4.0], [0.0, 3.0, 2.0]]], np.float32)
    depth = np.array([[[2.0, 2.0, 4.0], [9.0, 3.0, 2.5]]], np.float32)
    drawn = draw(depth, truth)
    at = {(y, x): (56 + 112 * y, 56 + 112 * x) for y in (0, 1) for x in (0, 1, 2)}
    true, found, error = (panel(drawn, i) for i in (1, 2, 3))
    assert (true[at[1, 0]] == 128).all() and (error[at[1, 0]] == 128).all()
    nearest = colour_map(np.zeros((1, 1), np.float32), 0, 1)[0, 0]
    assert (true[at[0, 0]] == nearest).all()  # of what was measured
    assert (found[at[0, 0]] == true[at[0, 1]]).all()
    assert (found[at[1, 0]] == true[at[0, 2]]).all()  # nothing is redder than the farthest truth
    expected = colour_map(np.array([[1.0, 0.25]], np.float32), 0, 0.5)[0]
    assert (error[at[0, 0]] == expected[0]).all() and (error[at[1, 2]] == expected[1]).all()


def test_without_truth_there_is_no_error_and_a_patch_need_not_divide_the_picture() -> None:
    depth = np.random.default_rng(0).uniform(1, 3, (2, 30, 44)).astype(np.float32)
    drawn = draw(depth, grid=(4, 6), labels=["a", "b"])
    assert drawn.shape[1] == 10 + 2 * (6 * 56 + 10)
    nothing = np.zeros((1, 2, 3), np.float32)
    assert draw(np.ones_like(nothing), nothing).dtype == np.uint8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"selections": [np.array([[7]], np.int32)]}, "outside the 7 tokens"),
        ({"selections": [np.array([[1]], np.int32)], "titles": ["a", "b"]}, "3 titles for 2"),
        ({"labels": ["a", "b"]}, "2 labels for 1 images"),
    ],
)
def test_what_does_not_fit_is_refused(more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(np.ones((1, 2, 3), np.float32), **more)
