"""Depth sets: rendered rooms, NYU Depth V2's files and folders of pairs become TFDS sets, or one clear line."""

import json
import struct
import sys

import h5py
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image
from tensorflow_datasets.core import hashing

from tests.depth_files import write_nyu_files, write_pair
from tosa_jax.data.builders import folders, open_builder, prepare, prepare_own, tfrecord
from tosa_jax.data.builders.rooms import rooms_config
from tosa_jax.data.depth.maps import DepthMaps
from tosa_jax.data.pipeline import DataConfig, open_dataset
from tosa_jax.data.synthetic.rooms import render_room
from tosa_jax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def nyu(tmp_path_factory):
    """(source_dir, data_dir, lines said) of rendered rooms in NYU's files."""
    source, data = write_nyu_files(tmp_path_factory.mktemp("raw")), tmp_path_factory.mktemp("tfds")
    said = []
    prepare("nyu_depth_v2", data, source, say=said.append)
    return source, data, said


def image_size(name: str, data_dir) -> tuple[int, int]:
    """Height and width of the training images of a depth set."""
    config = DataConfig(name=name, data_dir=str(data_dir), image_size=8, channels=3)
    dataset = open_dataset(config)
    assert dataset.kind is DepthMaps
    return dataset.image_size("train")


def examples(path, split: str) -> list[dict]:
    return list(tfds.builder_from_directory(str(path)).as_data_source(split))


def test_rooms_are_what_the_renderer_gives(tmp_path):
    builder = open_builder("rooms/24x32-5-3", str(tmp_path))
    assert image_size("rooms/24x32-5-3", tmp_path) == (24, 32)
    for number, (split, count) in enumerate((("train", 5), ("validation", 3))):
        found = {e["image"].tobytes(): e["depth"] for e in builder.as_data_source(split)}
        assert len(found) == count
        for i in range(count):
            image, depth = render_room((number, i), 24, 32)
            stored = found[image.tobytes()]
            assert stored.dtype == np.float16
            np.testing.assert_array_equal(stored, depth.astype(np.float16))
    info = tmp_path / "rooms/24x32-5-3/1.0.0/dataset_info.json"
    before = info.stat().st_mtime_ns
    open_builder.cache_clear()
    open_builder("rooms/24x32-5-3", str(tmp_path))
    assert info.stat().st_mtime_ns == before


def test_rooms_without_counts():
    config = rooms_config("480x640")
    assert (config.height, config.width, config.train, config.validation) == (480, 640, 4000, 400)


@pytest.mark.parametrize(
    "name", ["rooms", "rooms/480", "rooms/0x640", "rooms/8x8-4", "rooms/8x8-4-0"]
)
def test_rooms_names_that_say_no_size(tmp_path, name):
    with pytest.raises(ConfigError, match=f"data.name='{name}': write rooms/HEIGHTxWIDTH.*128x160"):
        prepare_own(name, tmp_path)


def test_other_generated_sets_have_no_configs_and_none_has_files(tmp_path):
    with pytest.raises(ConfigError, match="digits has no configs"):
        prepare_own("digits/large", tmp_path)
    with pytest.raises(ConfigError, match="rooms/8x8 has no files"):
        prepare_own("rooms/8x8", tmp_path, tmp_path)


def test_nyu_files_become_the_stock_set(nyu):
    source, data, said = nyu
    path = data / "nyu_depth_v2/0.0.1"
    stock = tfds.builder("nyu_depth_v2", data_dir=str(data)).info  # TFDS itself finds it
    assert {name: s.num_examples for name, s in stock.splits.items()} == {
        "train": 4,
        "validation": 2,
    }
    builder = tfds.builder_from_directory(str(path))
    assert str(builder.info.features) == str(stock.features)
    assert image_size("nyu_depth_v2", data) == (480, 640)
    # As TFDS orders them: by the hash of scene and file.
    keys = {
        "train": {f"room_{i % 2}_{i // 2:05d}.h5": (9, i) for i in range(4)},
        "validation": {f"official_{i:05d}.h5": (9, 4 + i) for i in range(2)},
    }
    for split, seeds in keys.items():
        order = sorted(seeds, key=hashing.Hasher(split).hash_key)
        for key, example in zip(order, examples(path, split), strict=True):
            image, depth = render_room(seeds[key], 480, 640)
            np.testing.assert_array_equal(example["image"], image)
            stored = depth.astype(np.float32).astype(np.float16)
            np.testing.assert_array_equal(example["depth"], stored)
    assert any("train: 4 examples of the 47584" in line for line in said)


def test_nyu_again_is_complete_already(nyu):
    source, data, _ = nyu
    said = []
    prepare("nyu_depth_v2", data, source / "nyudepthv2", say=said.append)
    assert said == [
        f"{split}: complete already, {n} examples" for split, n in (("train", 4), ("validation", 2))
    ]


def test_a_tfrecord_copy_of_nyu_is_converted(nyu, tmp_path):
    made, copy = nyu[1] / "nyu_depth_v2/0.0.1", tmp_path / "nyu_depth_v2/0.0.1"
    copy.mkdir(parents=True)
    (copy / "features.json").write_bytes((made / "features.json").read_bytes())
    info = json.loads((made / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    for shard in made.glob("*.array_record-*"):
        records = ArrayRecordReader(str(shard)).read_all()
        frames = []
        for record in records:
            length = struct.pack("<Q", len(record))
            for part in (length, record):
                frames += [part, struct.pack("<I", tfrecord.masked_crc32c(part))]
        (copy / shard.name.replace("array_record", "tfrecord")).write_bytes(b"".join(frames))
    with pytest.raises(DataError, match="exists only as tfrecord"):
        open_builder("nyu_depth_v2", str(tmp_path))
    prepare("nyu_depth_v2", tmp_path, say=lambda line: None)
    builder = open_builder("nyu_depth_v2", str(tmp_path))
    for got, wanted in zip(
        builder.as_data_source("validation"), examples(made, "validation"), strict=True
    ):
        np.testing.assert_array_equal(got["depth"], wanted["depth"])
        np.testing.assert_array_equal(got["image"], wanted["image"])


def test_nyu_refusals(tmp_path, monkeypatch):
    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message) as caught:
            prepare("nyu_depth_v2", tmp_path / "tfds", tmp_path / "raw", say=lambda line: None)
        assert not list((tmp_path / "tfds").rglob("dataset_info.json")) and "\n" not in str(
            caught.value
        )

    folder = tmp_path / "raw/train/kitchen"
    folder.mkdir(parents=True)
    refused("raw: no .h5 files; set source_dir to the folder of nyudepthv2.tar.gz, unpacked")
    (folder / "1.h5").write_bytes(b"nothing")
    refused("kitchen/1.h5: no HDF5 file with 'rgb' and 'depth'")
    with h5py.File(folder / "1.h5", "w") as file:
        file["rgb"] = np.zeros((3, 480, 640), np.uint8)
    refused("kitchen/1.h5: no HDF5 file with 'rgb' and 'depth'")
    with h5py.File(folder / "1.h5", "a") as file:
        file["depth"] = np.zeros((240, 320), np.float32)
    refused(r"kitchen/1.h5: 'depth' is float32 \(240, 320\), not numbers \(480, 640\)")
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(r'prepared with h5py: pip install "tosa-jax\[prepare\]"')
    with pytest.raises(
        DataError, match="nyu_depth_v2 is not in .*: set source_dir to the folder of nyudepthv2"
    ):
        prepare("nyu_depth_v2", tmp_path / "tfds")


def test_a_folder_of_splits_keeps_its_files(tmp_path):
    raw = tmp_path / "home"
    for i in range(3):
        write_pair(raw / "train", f"scene/{i}", seed=i)
    write_pair(raw / "val", "0", seed=3)
    Image.open(raw / "train/rgb/scene/0.png").save(raw / "train/rgb/scene/0.jpg")
    (raw / "train/rgb/scene/0.png").unlink()
    (raw / "train/rgb/notes.md").write_text("not a picture")
    path = prepare_own("depth_folder", tmp_path / "tfds", raw)
    builder = tfds.builder_from_directory(str(path))
    assert {k: s.num_examples for k, s in builder.info.splits.items()} == {
        "train": 3,
        "validation": 1,
    }
    assert image_size(f"depth_folder/{path.parent.name}", tmp_path / "tfds") == (24, 32)
    raw_bytes = {key: tfds.decode.SkipDecoding() for key in ("image", "depth")}
    for record in builder.as_data_source("train", decoders=raw_bytes):
        rgb = raw / record["file_name"].decode()
        depth = raw / "train/depth/scene" / f"{rgb.stem}.png"
        assert record["image"] == rgb.read_bytes() and record["depth"] == depth.read_bytes()
    assert prepare_own("depth_folder", tmp_path / "tfds", raw) == path
    # The depth map alone changed.
    Image.fromarray(np.ones((24, 32), np.uint16)).save(raw / "val/depth/0.png")
    assert prepare_own("depth_folder", tmp_path / "tfds", raw) != path


def test_a_folder_without_splits_holds_out_a_tenth(tmp_path):
    for i in range(12):
        write_pair(tmp_path / "home", str(i), size=(8, 8), seed=i)
    path = prepare_own("depth_folder", tmp_path / "tfds", tmp_path / "home")
    splits = tfds.builder_from_directory(str(path)).info.splits
    assert {k: s.num_examples for k, s in splits.items()} == {"train": 11, "validation": 1}


def test_lists_of_bts_name_the_pairs(tmp_path):
    raw = tmp_path / "sync"
    for i in range(3):
        write_pair(raw, str(i), seed=i)
    (raw / "train.txt").write_text(
        "/rgb/0.png /depth/1.png 518.8579\n\nrgb/1.png depth/0.png 518.8579\n"
    )
    (raw / "test.txt").write_text("rgb/2.png depth/2.png\n")
    path = prepare_own("depth_folder", tmp_path / "tfds", raw)
    raw_bytes = {key: tfds.decode.SkipDecoding() for key in ("image", "depth")}
    source = tfds.builder_from_directory(str(path)).as_data_source("train", decoders=raw_bytes)
    found = {e["file_name"]: e["depth"] for e in source}
    assert found == {
        f"rgb/{i}.png".encode(): (raw / f"depth/{1 - i}.png").read_bytes() for i in range(2)
    }
    # Sixteen bits: TFDS decodes them with OpenCV only, this project with Pillow.
    assert len(tfds.builder_from_directory(str(path)).as_data_source("test")) == 1
    (raw / "validation.txt").write_text("rgb/2.png None 721.5377\n")
    with pytest.raises(
        DataError, match="validation.txt, line 1: no such file .*/None; a line names"
    ):
        prepare_own("depth_folder", tmp_path / "tfds", raw)
    (raw / "validation.txt").write_text("rgb/2.png depth/2.png\nrgb/2.png\n")
    with pytest.raises(DataError, match="validation.txt, line 2: one name"):
        prepare_own("depth_folder", tmp_path / "tfds", raw)
    (raw / "validation.txt").write_text("\n")
    with pytest.raises(DataError, match="validation.txt: no line"):
        prepare_own("depth_folder", tmp_path / "tfds", raw)


def test_folders_that_do_not_fit(tmp_path):
    raw = tmp_path / "home"

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message) as caught:
            prepare_own("depth_folder", tmp_path / "tfds", raw)
        assert not list((tmp_path / "tfds").rglob("*.array_record*")) and "\n" not in str(
            caught.value
        )

    with pytest.raises(ConfigError, match="source_dir is empty"):
        prepare_own("depth_folder", tmp_path / "tfds")
    refused("home: neither rgb/ and depth/, nor train/rgb/")
    write_pair(raw / "train", "a")
    write_pair(raw / "val", "b")
    write_pair(raw / "validation", "b")
    refused("two sources of the split validation")
    (raw / "validation/rgb").rename(raw / "validation/colour")
    write_pair(raw / "val", "c")
    (raw / "val/depth/c.png").unlink()
    refused(r"val/rgb/c.png: no depth map c belongs to it \(1 files of .*val are alone\)")
    (raw / "val/rgb/c.png").unlink()
    (raw / "val/rgb/b.png").unlink()
    refused("val/rgb: no .jpg, .jpeg, .jfif, .png")
    write_pair(raw / "val", "b")
    write_pair(raw / "val", "d", depth=np.ones((32, 24), np.uint16))
    refused(r"val/depth/d.png: 32x24 pixels, but its picture val/rgb/d.png has 24x32")
    write_pair(raw / "val", "d", depth=np.ones((24, 32), np.uint8))
    refused("val/depth/d.png: its depth map is PNG in mode L, not a 16-bit grey PNG")
    (raw / "val/depth/d.png").write_bytes(b"")
    refused("val/depth/d.png: not the bytes of an image")
    (raw / "val/rgb/extra.png").write_bytes(b"")
    (raw / "val/rgb/extra.png").unlink()
    (raw / "val/rgb/d.png").unlink()
    refused("val/depth/d.png: no picture d belongs to it")


def test_large_folders_are_prepared_only_when_asked_for(tmp_path, monkeypatch):
    write_pair(tmp_path / "home", "a")
    write_pair(tmp_path / "home", "b")
    monkeypatch.setattr(folders, "AUTOMATIC_BYTES", 100)
    with pytest.raises(DataError, match="are not prepared on the way: run"):
        open_builder("depth_folder", str(tmp_path / "tfds"), str(tmp_path / "home"))
    prepare("depth_folder", tmp_path / "tfds", tmp_path / "home", say=lambda line: None)
    open_builder("depth_folder", str(tmp_path / "tfds"), str(tmp_path / "home"))
