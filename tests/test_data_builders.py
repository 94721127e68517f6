"""The project's own TFDS builders: what they hold, and what they say of broken files."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tosa_jax.data.builders import idx, prepare_own, prepared_dir
from tosa_jax.data.builders.digits import load_digits_split
from tosa_jax.data.builders.generated import small_png
from tosa_jax.data.pipeline import DataConfig, open_dataset
from tosa_jax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    return prepare_own("digits", tmp_path_factory.mktemp("tfds"))


def write_idx(path: Path, array: np.ndarray, *, magic: bytes | None = None) -> None:
    header = magic or bytes([0, 0, 8, array.ndim])
    data = header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def write_set(folder: Path, *, labels: int = 4, suffix: str = ".gz", first: int = 0) -> None:
    """Six training and three test images of 5x4, with classes 0 to labels - 1."""
    folder.mkdir(exist_ok=True)
    for part, count in (("train", 6), ("t10k", 3)):
        images = np.arange(count * 20, dtype=np.uint8).reshape(count, 5, 4) + first
        classes = np.arange(count, dtype=np.uint8) % labels
        classes[0] = labels - 1
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", classes)


def test_digits_split_is_stratified_and_complete():
    from sklearn.datasets import load_digits

    (train_x, train_y), (test_x, test_y) = load_digits_split("train"), load_digits_split("test")
    assert (len(train_x), len(test_x)) == (1437, 360)
    share = np.bincount(test_y) / (np.bincount(train_y) + np.bincount(test_y))
    assert np.abs(share - 0.2).max() < 0.005
    everything = np.concatenate([train_x, test_x]).reshape(-1, 64)
    wanted = np.rint(load_digits().data * 255 / 16)
    assert sorted(map(tuple, everything)) == sorted(map(tuple, wanted))


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_round_trip(digits_dir, split):
    images, labels = load_digits_split(split)
    wanted = sorted(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )
    source = tfds.builder_from_directory(str(digits_dir)).as_data_source(split)
    assert source[0]["image"].shape == (8, 8, 1) and source[0]["image"].dtype == np.uint8
    assert sorted((e["image"].tobytes(), int(e["label"])) for e in source) == wanted


def test_prepare_again_only_returns_the_path(digits_dir):
    before = {p: p.stat().st_mtime_ns for p in digits_dir.iterdir()}
    assert prepare_own("digits", digits_dir.parents[1]) == digits_dir
    assert {p: p.stat().st_mtime_ns for p in digits_dir.iterdir()} == before


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_round_trip(tmp_path, suffix):
    write_set(tmp_path / "raw", suffix=suffix)
    path = prepare_own("letters", tmp_path / "tfds", tmp_path / "raw")
    builder = tfds.builder_from_directory(str(path))
    assert builder.info.features["label"].names == [str(i) for i in range(10)]
    found = {e["image"].tobytes(): int(e["label"]) for e in builder.as_data_source("train")}
    images, labels = idx.read_split(tmp_path / "raw", "train")
    assert found == {x.tobytes(): int(y) for x, y in zip(images, labels, strict=True)}
    assert builder.info.splits["test"].num_examples == 3


def test_idx_files_that_change_are_prepared_again(tmp_path):
    write_set(tmp_path / "raw")
    first = prepare_own("letters", tmp_path / "tfds", tmp_path / "raw")
    assert prepare_own("letters", tmp_path / "tfds", tmp_path / "raw") == first
    write_set(tmp_path / "raw", first=100)
    second = prepare_own("letters", tmp_path / "tfds", tmp_path / "raw")
    assert second != first
    # The earlier one stays: another run may be reading it.
    for path, lowest in ((first, 0), (second, 100)):
        source = tfds.builder_from_directory(str(path)).as_data_source("train")
        assert min(e["image"].min() for e in source) == lowest


def test_class_names(tmp_path):
    write_set(tmp_path / "ten", labels=2)
    assert idx.idx_config("fashion_mnist", tmp_path / "ten").class_names[9] == "Ankle boot"
    write_set(tmp_path / "many", labels=26)
    assert len(idx.idx_config("letters", tmp_path / "many").class_names) == 26
    with pytest.raises(DataError, match="label 25, but fashion_mnist has 10 classes"):
        idx.idx_config("fashion_mnist", tmp_path / "many")


GOOD = bytes([0, 0, 8, 2]) + struct.pack(">2I", 2, 3) + bytes(6)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x", GOOD[:-1], r"truncated: the header says \(2, 3\), that is 6 values, but 5"),
        ("x", GOOD[:9], "truncated within its header"),
        ("x", GOOD[:2], "truncated within its header"),
        ("x", b"", "truncated within its header"),
        ("x", GOOD + b"ab", "2 trailing bytes"),
        ("x", b"\x00\x00\x0d" + GOOD[3:], "not an IDX file of unsigned bytes.*0x00000d02"),
        ("x", b"<html>", "not an IDX file"),
        ("x.gz", gzip.compress(GOOD, mtime=0)[:-9], "truncated or broken gzip"),
        ("x.gz", gzip.compress(GOOD, mtime=0)[:12] + b"????????", "truncated or broken gzip"),
        ("x.gz", GOOD, "truncated or broken gzip"),
        ("x.gz", gzip.compress(GOOD[:-1], mtime=0), "truncated: the header"),
        ("x", None, "no such file"),
    ],
)
def test_read_idx_errors(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        idx.read_idx(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_read_idx_good(tmp_path):
    (tmp_path / "x").write_bytes(GOOD)
    assert idx.read_idx(tmp_path / "x").shape == (2, 3)


def test_bad_sets_are_refused_and_nothing_is_written(tmp_path):
    raw, images = tmp_path / "raw", "train-images-idx3-ubyte.gz"

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            prepare_own("letters", tmp_path / "tfds", raw)
        assert not (tmp_path / "tfds").exists()

    refused("no train-images-idx3-ubyte or train-images-idx3-ubyte.gz; set source_dir")
    write_set(raw)
    write_idx(raw / images, np.zeros((5, 5, 4), np.uint8))
    refused(f"{images}: 5 images, but train-labels-idx1-ubyte.gz has 6 labels")
    write_idx(raw / images, np.zeros((6, 4, 4), np.uint8))
    refused(r"train images are \(4, 4\), test images \(5, 4\)")
    write_idx(raw / images, np.zeros(6, np.uint8))
    refused(f"{images}: an array of shape \\(6,\\), but 3 dimensions")


def test_an_error_half_way_leaves_nothing(tmp_path, monkeypatch):
    write_set(tmp_path / "raw")
    calls = []

    def failing(image: np.ndarray):
        calls.append(image)
        if len(calls) == 4:
            raise OSError("disk full")
        return small_png(image)

    monkeypatch.setattr(idx, "small_png", failing)
    with pytest.raises(DataError, match="cannot prepare letters there.*disk full"):
        prepare_own("letters", tmp_path / "tfds", tmp_path / "raw")
    assert len(calls) == 4
    left = [p.name for p in (tmp_path / "tfds/idx").rglob("*") if p.is_file()]
    assert left == [".preparing"]  # whose lock keeps others waiting
    monkeypatch.undo()
    assert (prepare_own("letters", tmp_path / "tfds", tmp_path / "raw") / "features.json").is_file()


def test_what_is_not_ours(tmp_path):
    with pytest.raises(ConfigError, match="it prepares digits, rooms, several_digits, and IDX"):
        prepare_own("mnist", tmp_path)
    with pytest.raises(ConfigError, match="digits has no files"):
        prepare_own("digits", tmp_path, tmp_path)


def test_sets_that_cannot_be_opened_say_what_to_do(tmp_path, digits_dir):
    with pytest.raises(
        DataError, match=r"not prepared.*python -m tosa_jax.prepare --config=\.\.\."
    ):
        prepared_dir("imagenet2012", tmp_path)
    copy = tmp_path / "birds/blue/2.0.0"
    copy.mkdir(parents=True)
    for file in digits_dir.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="set name to one of birds/blue"):
        prepared_dir("birds", tmp_path)
    assert prepared_dir("birds/blue", tmp_path) == copy
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(DataError, match="exists only as tfrecord.*tosa_jax.prepare"):
        prepared_dir("birds/blue", tmp_path)


def test_the_newest_version_is_opened(tmp_path, digits_dir):
    for version in ("1.9.0", "1.10.0"):
        (tmp_path / "birds" / version).mkdir(parents=True)
        for file in digits_dir.iterdir():
            (tmp_path / "birds" / version / file.name).write_bytes(file.read_bytes())
    assert prepared_dir("birds", tmp_path).name == "1.10.0"
    (tmp_path / "birds/2.0.0.incomplete").mkdir()
    assert prepared_dir("birds", tmp_path).name == "1.10.0"


def test_a_set_without_labels_is_refused(tmp_path, digits_dir):
    folder = tmp_path / "birds/1.0.0"
    folder.mkdir(parents=True)
    for file in digits_dir.iterdir():
        (folder / file.name).write_text(file.read_text()) if file.suffix == ".json" else None
    text = (folder / "features.json").read_text().replace('"label"', '"species"')
    (folder / "features.json").write_text(text)
    with pytest.raises(
        DataError, match="no feature 'image' with a 'label' of kind ClassLabel, 'labels'"
    ):
        open_dataset(DataConfig(name="birds", data_dir=str(tmp_path), image_size=8, channels=1))
