"""Batches of depth sets: of one form, a function of (seed, step), evaluation untouched; bad maps and settings told."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests.depth_files import write_nyu_files, write_pair
from tosa_jax.data.builders import prepare
from tosa_jax.data.pipeline import (
    DataConfig,
    DatasetFacts,
    open_dataset,
)
from tosa_jax.data.synthetic.rooms import render_room
from tosa_jax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    return DataConfig(
        name="rooms/24x32-12-5",
        data_dir=str(tmp_path_factory.mktemp("tfds")),
        eval_split="validation",
        image_size=(16, 24),
        channels=3,
        augment="nyu",
    )


@pytest.fixture(scope="module")
def nyu(tmp_path_factory) -> DataConfig:
    """Rendered rooms that went the way of NYU's files."""
    data = tmp_path_factory.mktemp("nyu")
    source = write_nyu_files(tmp_path_factory.mktemp("raw"), train=3, validation=2)
    prepare("nyu_depth_v2", data, source, say=lambda line: None)
    return DataConfig(
        name="nyu_depth_v2",
        data_dir=str(data),
        eval_split="validation",
        image_size=(480, 640),
        channels=3,
        augment="nyu",
        depth_box=(45, 472, 43, 608),
    )


def take(config: DataConfig, count: int, **kwargs) -> list[dict]:
    stream = open_dataset(config).train_batches(**({"batch_size": 4, "seed": 3} | kwargs))
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def assert_same(got, wanted):
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_facts(config):
    facts = DatasetFacts(12, 5, 0, (), "depth")
    assert open_dataset(config).facts == facts
    assert open_dataset(dataclasses.replace(config, eval_split="train[:4]")).facts.num_eval == 4


def test_training_batches_have_the_declared_form(config):
    first, second = take(config, 2)
    assert first.keys() == {"image", "depth"}
    assert first["image"].shape == (4, 16, 24, 3) and first["image"].dtype == np.uint8
    assert first["depth"].shape == (4, 16, 24) and first["depth"].dtype == np.float32
    assert first["depth"].max() > 1 and (first["depth"] != second["depth"]).any()
    assert (first["depth"] != take(config, 1, seed=4)[0]["depth"]).any()


def test_batches_can_be_resumed_and_split_over_processes(config):
    whole = take(config, 5)
    assert_same(take(config, 2, start_step=3), whole[3:])
    parts = [take(config, 5, process_index=i, process_count=2) for i in range(2)]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]
    assert_same(joined, whole)


@pytest.mark.parametrize(
    "change",
    [
        {"workers": "threads:0"},
        {"in_memory": True},
        {"workers": "processes:1"},
        {"prefetch_mib": 1},
    ],
    ids=str,
)
def test_batches_do_not_depend_on_how_they_are_read(config, change):
    assert_same(take(dataclasses.replace(config, **change), 4), take(config, 4))


def test_evaluation_from_memory_is_the_same(config):
    cached = dataclasses.replace(config, in_memory=True, workers="threads:0")
    both = [list(open_dataset(x).eval_batches(batch_size=3)) for x in (cached, config)]
    assert_same(*both)


@pytest.mark.parametrize("size", [(16, 24), (24, 32)])
def test_evaluation_is_whole_and_untouched(config, size):
    boxed = dataclasses.replace(config, image_size=size, depth_box=(4, 22, 4, 30))
    batches = list(open_dataset(boxed).eval_batches(batch_size=3))
    assert [b["mask"].tolist() for b in batches] == [[1, 1, 1], [1, 1, 0]]
    rooms = {}
    for i in range(5):
        image, depth = render_room((1, i), 24, 32)
        rooms[image.tobytes()] = depth.astype(np.float16)
    for batch in batches:
        assert batch["image"].shape == (3, 24, 32, 3) and batch["depth"].dtype == np.float32
        for image, depth, mask in zip(batch["image"], batch["depth"], batch["mask"], strict=True):
            if mask:
                np.testing.assert_array_equal(depth, rooms.pop(image.tobytes()))
    assert not rooms
    assert not batches[-1]["image"][2].any() and not batches[-1]["depth"][2].any()


def test_a_whole_image_loses_the_depth_outside_of_the_box(config):
    boxed = dataclasses.replace(
        config, image_size=(24, 32), augment="none", depth_box=(4, 22, 5, 30)
    )
    (batch,) = take(boxed, 1)
    inside = np.zeros((24, 32), bool)
    inside[4:22, 5:30] = True
    assert (batch["depth"][:, inside] > 0).all() and not batch["depth"][:, ~inside].any()
    assert batch["image"][:, ~inside].any()


def test_nyu_goes_the_same_way(nyu):
    assert open_dataset(nyu).facts == DatasetFacts(3, 2, 0, (), "depth")
    (batch,) = take(nyu, 1, batch_size=2)
    assert batch["image"].shape == (2, 480, 640, 3) and batch["depth"].shape == (2, 480, 640)
    assert not batch["depth"][:, :20].any() and not batch["depth"][:, :, 630:].any()
    assert (batch["depth"][:, 100:400, 100:500] > 0.3).all()
    (crop,) = take(dataclasses.replace(nyu, image_size=(416, 544)), 1, batch_size=2)
    assert crop["image"].shape == (2, 416, 544, 3) and (crop["depth"] > 0).mean() > 0.95
    (scored,) = open_dataset(nyu).eval_batches(batch_size=2)
    assert (scored["depth"] > 0).all() and scored["mask"].tolist() == [1, 1]


def test_png_depth_is_divided_by_its_scale(tmp_path):
    for i in range(4):
        write_pair(tmp_path / "home/train", str(i), seed=i)
        write_pair(tmp_path / "home/val", str(i), seed=i)
    settings = {
        "name": "depth_folder",
        "data_dir": str(tmp_path / "tfds"),
        "source_dir": str(tmp_path / "home"),
    }
    settings |= {"eval_split": "validation", "image_size": (24, 32), "channels": 3}
    with pytest.raises(
        ConfigError, match="data.depth_scale is missing.*NYU Depth V2 1000, KITTI 256"
    ):
        _ = open_dataset(DataConfig(**settings)).facts
    config = DataConfig(**settings, depth_scale=1000.0)
    rooms = dict(image_and_depth(i) for i in range(4))
    (batch,) = open_dataset(config).eval_batches(batch_size=4)
    for image, depth in zip(batch["image"], batch["depth"], strict=True):
        np.testing.assert_allclose(depth, rooms[image.tobytes()], atol=0.0006)
    assert_same(take(dataclasses.replace(config, in_memory=True), 2), take(config, 2))


def image_and_depth(seed: int) -> tuple[bytes, np.ndarray]:
    image, depth = render_room((8, seed), 24, 32)
    return image.tobytes(), depth


class Maps(tfds.core.GeneratorBasedBuilder):
    """Depth maps that the test gives; a size of None leaves the size open, and the maps are PNG files."""

    VERSION = tfds.core.Version("1.0.0")
    maps = []
    size = (8, 8)

    def _info(self):
        depth = tfds.features.Tensor(shape=(8, 8), dtype=np.float16)
        if self.size is None:
            depth = tfds.features.Image(
                shape=(None, None, 1), dtype=np.uint16, encoding_format="png"
            )
        image = tfds.features.Image(shape=(*(self.size or (None, None)), 3))
        features = tfds.features.FeaturesDict({"image": image, "depth": depth})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        for i, (size, depth) in enumerate(self.maps):
            image = png(np.full((*size, 3), 10 * i, np.uint8))
            yield i, {"image": image, "depth": depth if self.size else png(depth)}


def png(array: np.ndarray) -> io.BytesIO:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    buffer.seek(0)
    return buffer


def prepared(folder, monkeypatch, maps: list, *, files: bool = False, **settings) -> DataConfig:
    monkeypatch.setattr(Maps, "maps", maps)
    monkeypatch.setattr(Maps, "size", None if files else (8, 8))
    Maps(data_dir=str(folder)).download_and_prepare(
        file_format="array_record", download_config=tfds.download.DownloadConfig(num_shards=1)
    )
    settings = {"image_size": 8, "channels": 3, "depth_scale": 100.0 if files else 0.0} | settings
    return DataConfig(name="maps", data_dir=str(folder), **settings)


def spoilt(value: float) -> np.ndarray:
    depth = np.full((8, 8), 2, np.float16)
    depth[3, 4] = value
    return depth


GOOD = ((8, 8), spoilt(2))


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.5, "its depth map goes down to -1.5 m, below 0"),
        (np.inf, "its depth map holds values that are not finite: write 0 there"),
        (np.nan, "its depth map holds values that are not finite"),
    ],
)
def test_depth_that_is_no_distance(tmp_path, monkeypatch, value, message, in_memory):
    maps = [GOOD, ((8, 8), spoilt(value)), GOOD]
    config = prepared(tmp_path, monkeypatch, maps, in_memory=in_memory)
    with pytest.raises(
        DataError, match=rf"split test: image 1 cannot be decoded \({message}.*evaluation"
    ):
        list(open_dataset(config).eval_batches(batch_size=3))
    with pytest.raises(DataError, match=rf"{message}.*max_bad_fraction=0.0 allows no more"):
        take(config, 2)
    some = dataclasses.replace(config, max_bad_fraction=0.4)
    assert all((batch["depth"] == 2).all() for batch in take(some, 3))


def test_a_map_without_a_measurement_is_an_error_only_in_evaluation(tmp_path, monkeypatch):
    config = prepared(tmp_path, monkeypatch, [GOOD, ((8, 8), np.zeros((8, 8), np.float16))])
    batches = take(config, 2)
    assert {float(x) for batch in batches for x in batch["depth"].max(axis=(1, 2))} == {0.0, 2.0}
    with pytest.raises(
        DataError, match=r"image 1 cannot be decoded \(no pixel of its depth map has a measurement"
    ):
        list(open_dataset(config).eval_batches(batch_size=2))
    one = spoilt(0)
    one[:] = 0
    one[7, 7] = 3
    config = prepared(tmp_path / "one", monkeypatch, [GOOD, ((8, 8), one)])
    assert [b["depth"].max() for b in open_dataset(config).eval_batches(batch_size=1)] == [2, 3]


def test_files_of_unequal_sizes(tmp_path, monkeypatch):
    sixteen = [np.full(size, 300, np.uint16) for size in ((8, 8), (8, 9), (9, 8), (6, 8))]
    same, wide, high, small = sixteen
    config = prepared(tmp_path, monkeypatch, [((8, 8), same), ((8, 8), wide)], files=True)
    with pytest.raises(
        DataError, match=r"image 1 cannot.*its depth map has 8x9 pixels, the image 8x8"
    ):
        list(open_dataset(config).eval_batches(batch_size=2))
    with pytest.raises(DataError, match="its depth map has 8x9 pixels, the image 8x8"):
        take(config, 2)
    config = prepared(tmp_path / "b", monkeypatch, [((8, 8), same), ((9, 8), high)], files=True)
    assert (take(config, 2)[1]["depth"] == 3).all()  # crops of either
    with pytest.raises(DataError, match=r"it has 9x8 pixels, others of the split 8x8; cut them"):
        list(open_dataset(config).eval_batches(batch_size=2))
    config = prepared(tmp_path / "c", monkeypatch, [((8, 8), same), ((6, 8), small)], files=True)
    with pytest.raises(DataError, match="6x8 pixels are smaller than image_size=8x8"):
        take(config, 2)
    config = prepared(tmp_path / "d", monkeypatch, [((8, 8), same.astype(np.uint8))], files=True)
    with pytest.raises(DataError, match="its depth map is PNG in mode L, not a 16-bit grey PNG"):
        list(open_dataset(config).eval_batches(batch_size=1))


def test_settings_that_do_not_go_with_a_set(config, digits_dir):
    def refused(message: str, of: DataConfig = config, **change) -> None:
        with pytest.raises(ConfigError, match=message):
            _ = open_dataset(dataclasses.replace(of, **change)).facts

    refused(
        "augment='deit' is not for a depth set such as 'rooms/24x32-12-5'; known are none, flip, nyu",
        augment="deit",
    )
    refused("augment='nyuu' is unknown; did you mean 'nyu'", augment="nyuu")
    refused(r"depth_scale=1000.0, but .* has its depth in metres: set it to 0", depth_scale=1000.0)
    refused(r"image_size=\(24, 33\): the images of .* have only 24x32 pixels", image_size=(24, 33))
    refused(
        r"image_size=\(20, 24\): .* have only 18x24 pixels within config.data.depth_box",
        image_size=(20, 24),
        depth_box=(4, 22, 4, 28),
    )
    for scale in (-1.0, float("nan"), float("inf")):
        refused("depth_scale=.* must be 0 or more", depth_scale=scale)
    for box in ((1, 2, 3), (4, 4, 0, 9), (0, 9, 5, 4), (-1, 9, 0, 9)):
        refused("depth_box=.* must be four pixel positions", depth_box=box)
    for size in (0, (0, 8), (8, -1)):
        refused("image_size=.* must be at least 1", image_size=size)
    digits = DataConfig(name="digits", data_dir=digits_dir, image_size=(8, 8), channels=1)
    assert open_dataset(digits).image_size("test") == (8, 8)
    refused("augment='nyu' is not for a classification set such as 'digits'", digits, augment="nyu")
    refused(
        r"image_size=\(8, 10\): images of a classification set become squares",
        digits,
        image_size=(8, 10),
    )
    out = dataclasses.replace(config, depth_box=(0, 25, 0, 32))
    with pytest.raises(DataError, match="reaches out of 24x32 pixels"):
        take(out, 1)
