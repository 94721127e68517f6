"""Cluttered canvases: the item is whole and in bounds, clutter leaves room, and the seed decides everything."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.test_data_builders import write_idx, write_set
from tosa_jax import prepare
from tosa_jax.data.builders import idx, open_builder, prepare_own
from tosa_jax.data.synthetic.clutter import CLUTTER, draw_canvas
from tosa_jax.errors import ConfigError, DataError

NAME = "cluttered_fashion_mnist/56-7-3"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Five training and four test items of 28x28 in IDX files: each of a grey of its own, dark edges."""
    folder = tmp_path_factory.mktemp("raw")
    for part, greys in (("train", (40, 80, 120, 160, 200)), ("t10k", (50, 100, 150, 250))):
        images = np.zeros((len(greys), 28, 28), np.uint8)
        images[:, 2:-2, 2:-2] = np.array(greys)[:, None, None]
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(len(greys), dtype=np.uint8) + 3)
    return folder


def white_items(count: int = 6) -> np.ndarray:
    return np.full((count, 28, 28), 255, np.uint8)


def test_the_item_is_on_top_inside_its_box():
    items = np.random.default_rng(0).integers(100, 200, (4, 28, 28), dtype=np.uint8)
    items[2] = 255  # so that clutter, of the others, is darker
    sizes = set()
    for seed in range(60):
        image, (top, left, bottom, right) = draw_canvas((0, seed), items, 2, 56)
        assert 0 <= top < bottom <= 56 and 0 <= left < right <= 56 and bottom - top == right - left
        inside = np.zeros((56, 56), bool)
        inside[top:bottom, left:right] = True
        np.testing.assert_array_equal(image == 255, inside)
        sizes.add(bottom - top)
    assert sizes == set(range(21, 29))  # three quarters of the item to the whole of it


def test_the_item_at_full_scale_is_the_source_and_clutter_shows_where_it_is_black():
    items = np.full((2, 28, 28), 90, np.uint8)
    items[0] = np.eye(28, dtype=np.uint8) * 255
    seen = 0
    for seed in range(200):
        image, (top, left, bottom, right) = draw_canvas((0, seed), items, 0, 56)
        if bottom - top == 28:
            place = image[top:bottom, left:right]
            np.testing.assert_array_equal(np.diagonal(place), 255)
            assert set(np.unique(place[items[0] == 0])) == {0, 90}
            seen += 1
    assert seen


def test_clutter_is_of_other_items_and_leaves_room():
    items = white_items()
    items[3] = 0
    for size in (56, 84):
        shares = []
        for seed in range(60):
            image, _ = draw_canvas((0, seed), items, 3, size)
            shares.append((image > 0).mean())
        # Squares that fall anywhere, as often as their area says: 1 - exp(-area) of the canvas.
        assert abs(np.mean(shares) - (1 - np.exp(-CLUTTER))) < 0.05
        assert 0.2 < min(shares) and max(shares) < 0.7
    items[:] = 0
    items[3] = 255
    image, (top, left, bottom, right) = draw_canvas((0, 0), items, 3, 56)
    image[top:bottom, left:right] = 0
    assert not image.any()
    assert (
        draw_canvas((0, 0), white_items(1), 0, 56).image > 0
    ).mean() > 0.3  # a lone one gives its own


def test_pieces_are_turned_every_way():
    items = np.zeros((2, 28, 28), np.uint8)
    rows, columns = np.indices((28, 28))
    items[1] = 60 + 5 * rows + columns  # brighter downwards, a little to the right
    steps = set()
    for seed in range(20):
        image = draw_canvas((0, seed), items, 0, 56).image.astype(int)
        down, right = np.diff(image, axis=0)[:, :-1], np.diff(image, axis=1)[:-1]
        steps |= set(zip(down.ravel().tolist(), right.ravel().tolist(), strict=True))
    # At full scale only: five grey levels along one axis and one along the other.
    wanted = {(5, 1), (5, -1), (-5, 1), (-5, -1), (1, 5), (1, -5), (-1, 5), (-1, -5)}
    assert wanted <= steps


def test_a_seed_decides_and_another_one_differs():
    items = np.random.default_rng(1).integers(0, 255, (9, 28, 28), dtype=np.uint8)
    one, again, other = (draw_canvas((0, i), items, 4, 56) for i in (7, 7, 8))
    np.testing.assert_array_equal(one.image, again.image)
    np.testing.assert_array_equal(one.box, again.box)
    assert (one.image != other.image).mean() > 0.3
    # What every machine has to draw.
    assert (one.box.tolist(), int(one.image.sum())) == ([1, 6, 28, 33], 182223)


def test_the_set_holds_each_item_with_its_label(raw, tmp_path):
    builder = open_builder(NAME, str(tmp_path), str(raw))
    assert builder.info.features["label"].names[9] == "Ankle boot"
    for number, (split, count) in enumerate((("train", 7), ("test", 3))):
        items, labels = idx.read_split(raw, split)
        found = {e["image"].tobytes(): e for e in builder.as_data_source(split)}
        assert len(found) == count
        for i in range(count):
            canvas = draw_canvas((number, i), items, i % len(items), 56)
            example = found[canvas.image.tobytes()]
            assert example["image"].shape == (56, 56, 1)
            assert example["label"] == labels[i % len(items)]
            np.testing.assert_array_equal(example["box"], canvas.box)
            top, left, bottom, right = example["box"]
            middle = example["image"][(top + bottom) // 2, (left + right) // 2, 0]
            assert middle == items[i % len(items), 14, 14]


def test_more_canvases_begin_with_the_same_ones_and_files_that_change_are_another_set(
    raw, tmp_path
):
    first, more = (
        prepare_own(f"cluttered_fashion_mnist/{n}", tmp_path, raw) for n in ("32-2-1", "32-4-1")
    )
    assert first.parents[1] == tmp_path / "cluttered_fashion_mnist"
    few, many = (
        {e["image"].tobytes() for e in tfds.builder_from_directory(str(p)).as_data_source("train")}
        for p in (first, more)
    )
    assert len(few) == 2 and few < many
    before = (first / "dataset_info.json").stat().st_mtime_ns
    assert prepare_own("cluttered_fashion_mnist/32-2-1", tmp_path, raw) == first
    assert (first / "dataset_info.json").stat().st_mtime_ns == before
    # Its source gone, a set is read by its full name.
    assert open_builder(f"cluttered_fashion_mnist/{first.parent.name}", str(tmp_path)).info.splits
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in raw.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    write_idx(changed / "t10k-labels-idx1-ubyte", np.zeros(4, np.uint8))
    assert prepare_own("cluttered_fashion_mnist/32-2-1", tmp_path, changed) != first


@pytest.mark.parametrize(
    "name", ["", "/56", "/27-4-4", "/56-0-4", "/56-4-0", "/56-4-4-4", "/56x56-4-4"]
)
def test_names_that_say_no_set(raw, tmp_path, name):
    name = f"cluttered_fashion_mnist{name}"
    with pytest.raises(ConfigError, match=f"data.name='{name}': write .*/56-20000-4000"):
        prepare_own(name, tmp_path / "tfds", raw)
    assert not (tmp_path / "tfds").exists()


def test_sources_that_are_missing_or_not_fashion_mnist(tmp_path, capsys):
    with pytest.raises(DataError, match="no train-images-idx3-ubyte or .*gz; set source_dir"):
        prepare_own(NAME, tmp_path / "tfds", tmp_path / "nowhere")
    write_set(tmp_path / "small")
    with pytest.raises(DataError, match=r"images are \(5, 4\), but Fashion-MNIST's are \(28, 28\)"):
        prepare_own(NAME, tmp_path / "tfds", tmp_path / "small")
    with pytest.raises(DataError, match=f"{NAME}' is not prepared .*set source_dir"):
        open_builder(NAME, str(tmp_path / "tfds"))
    argv = ["--config=configs/cluttered_fashion.py", f"--config.data.data_dir={tmp_path}/tfds"]
    assert prepare.main(argv) == 2
    error = capsys.readouterr().err
    assert "set source_dir to the folder with the IDX files" in error and error.count("\n") == 1
    assert not (tmp_path / "tfds").exists()
