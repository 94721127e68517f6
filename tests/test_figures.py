"""Pictures of selected tokens."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tosa_jax.reporting.figures import selected_tokens_figure, write_png

PREFIX = 2


def figure(selection: list[int], level: int = 100, **more) -> np.ndarray:
    """One grey picture of 112 pixels with 2x2 patches: nothing is enlarged."""
    images = np.full((1, 112, 112, 3), level, np.uint8)
    more = {"grid": (2, 2), "num_prefix_tokens": PREFIX} | more
    return selected_tokens_figure(images, (np.array([selection], np.int32),), **more)


def panel(drawn: np.ndarray, column: int, side: int = 112) -> np.ndarray:
    """The panel of a figure with one row: 10 pixels between panels, 30 above them."""
    left = 10 + column * (side + 10)
    return drawn[30 : 30 + side, left : left + side]


def test_selected_patches_are_untouched_and_others_faded() -> None:
    drawn = figure([0, 1, PREFIX + 1, PREFIX + 2])
    assert drawn.dtype == np.uint8
    assert (panel(drawn, 0) == 100).all()
    shown = panel(drawn, 1)
    assert (shown[:56, 56:] == 100).all() and (shown[56:, :56] == 100).all()
    faded = round(0.25 * 100 + 0.75 * 225)
    assert (shown[1:55, 1:55] == faded).all() and (shown[57:, 57:] == faded).all()


@pytest.mark.parametrize("level", [0, 255])
def test_bypassed_patches_show_on_dark_and_on_light_pictures(level: int) -> None:
    shown = panel(figure([0, 1, PREFIX], level), 1).astype(int)
    assert abs(shown[28, 28] - shown[84, 84]).min() > 15


def test_prefix_tokens_are_no_patches() -> None:
    shown = panel(figure([0, 1]), 1)
    assert (shown != 100).all()


def test_no_grid_on_patches_that_it_would_hide() -> None:
    shown = panel(figure([0, 1], grid=(28, 28)), 1)
    assert len(np.unique(shown)) == 1


def test_rows_and_columns_keep_their_order() -> None:
    images = np.stack([np.full((112, 112, 1), level, np.uint8) for level in (40, 200)])
    first = np.array([[0], [1]], np.int32)
    second = np.array([[2, 3], [0, 3]], np.int32)
    drawn = selected_tokens_figure(images, (first, second), grid=(2, 2), num_prefix_tokens=0)
    for row, level in enumerate((40, 200)):
        for column, selection in enumerate((first, second), start=1):
            shown = panel(drawn[row * 122 :], column)
            kept = [(shown[y, x] == level).all() for y in (28, 84) for x in (28, 84)]
            assert np.flatnonzero(kept).tolist() == selection[row].tolist()


def test_small_pictures_are_enlarged_sharply_and_large_ones_reduced() -> None:
    small = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    drawn = selected_tokens_figure(small, (), grid=(4, 4), num_prefix_tokens=0)
    assert (panel(drawn, 0)[::14, ::14, 0] == small[0, :, :, 0]).all()
    large = np.zeros((1, 480, 640, 3), np.uint8)
    drawn = selected_tokens_figure(large, (), grid=(30, 40), num_prefix_tokens=0)
    assert drawn.shape == (30 + 240 + 10, 10 + 320 + 10, 3)


def test_texts_are_drawn_and_never_cut() -> None:
    plain = figure([0], titles=[" ", " "])
    assert (figure([0])[:30] != plain[:30]).any()
    labelled = figure([0], labels=["a very long label " * 10])
    assert labelled.shape[0] == plain.shape[0] + 20
    assert labelled.shape[1] > plain.shape[1]
    assert (labelled[:, -10:] == 255).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"grid": (3, 2)}, "does not divide"),
        ({"grid": (1, 1)}, "outside the 3 tokens"),
        ({"titles": ["input"]}, "1 titles for 2 columns"),
        ({"labels": ["a", "b"]}, "2 labels for 1 images"),
    ],
)
def test_what_does_not_fit_is_refused(more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figure([0, 1, PREFIX + 3], **more)


def test_png_survives_the_file(tmp_path: Path) -> None:
    drawn = figure([0, PREFIX])
    write_png(tmp_path / "a.png", drawn)
    with Image.open(tmp_path / "a.png") as image:
        assert (np.asarray(image) == drawn).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_score_maps_stand_below_their_selections():
    scores = np.array([[9.0, 9.0, 0.0, 1.0, 2.0, 3.0]])  # two prefix tokens, then 2x2 patches
    drawn = figure([0, 1, PREFIX], scores=(scores,), labels=["a"])
    assert (panel(drawn, 1)[28, 28] == 100).all()
    below = panel(drawn[122:], 1)
    patches = [below[y, x].astype(int).sum() for y in (28, 84) for x in (28, 84)]
    assert patches == sorted(patches) and len(set(patches)) == 4
    assert (below[28, 28] == (16, 14, 54)).all() and (below[84, 84] == (250, 232, 80)).all()
    # The label stands below both rows, once.
    assert drawn.shape[0] == figure([0], labels=["a"]).shape[0] + 122


def test_equal_scores_are_no_map():
    below = panel(figure([0], scores=(np.full((1, 6), 0.5),))[122:], 1)
    assert len(np.unique(below.reshape(-1, 3), axis=0)) == 1
