"""Folders of images: the forms, what is skipped, what is refused, and that bytes stay exact."""

import io
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tosa_jax.data.builders import folders, image_folder, open_builder, prepare_own, shards
from tosa_jax.data.decoding import Preprocess
from tosa_jax.errors import ConfigError, DataError


def image_bytes(seed: int, suffix: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (seed % 7 + 1, 5, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG" if suffix == ".png" else "JPEG")
    return buffer.getvalue()


def fill(folder: Path, count: int, suffix: str = ".jpg", seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}{suffix}").write_bytes(image_bytes(seed + i, suffix))


def rows(path: Path, split: str) -> dict[str, tuple[bytes, int]]:
    builder = tfds.builder_from_directory(str(path))
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return {r["file_name"].decode(): (r["image"], int(r["label"])) for r in source}


def make(tmp_path: Path, **options) -> Path:
    return prepare_own("image_folder", tmp_path / "tfds", tmp_path / "raw", **options)


def labels_of(path: Path) -> list[str]:
    return tfds.builder_from_directory(str(path)).info.features["label"].names


@pytest.mark.parametrize("second", ["val", "valid", "dev", "test"])
def test_split_folders(tmp_path, second):
    raw = tmp_path / "raw"
    for split, count in (("train", 6), (second, 2)):
        fill(raw / split / "b dog", count, ".PNG".lower())
        fill(raw / split / "a cat" / "images", count, ".JPEG")
    path = make(tmp_path)
    name = "test" if second == "test" else "validation"
    assert {*tfds.builder_from_directory(str(path)).info.splits} == {"train", name}
    assert labels_of(path) == ["a cat", "b dog"]
    for split, folder in (("train", "train"), (name, second)):
        found = rows(path, split)
        wanted = {p.relative_to(raw).as_posix(): p.read_bytes()
                  for p in (raw / folder).rglob("*.*")}  # fmt: skip
        assert {name: data for name, (data, _) in found.items()} == wanted
        assert all(label == ("b dog" in name) for name, (_, label) in found.items())


def test_class_folders_are_divided_by_class_and_always_alike(tmp_path):
    for name, count in (("x", 40), ("y", 20), ("z", 2), ("one", 1)):
        fill(tmp_path / "raw" / name, count)
    path = make(tmp_path)
    train, held = rows(path, "train"), rows(path, "validation")
    assert labels_of(path) == ["one", "x", "y", "z"]
    assert len(train) + len(held) == 63 and not train.keys() & held.keys()
    counts = [sum(label == k for _, label in held.values()) for k in range(4)]
    assert counts == [0, 4, 2, 1]
    again = prepare_own("image_folder", tmp_path / "other", tmp_path / "raw")
    assert rows(again, "validation") == held
    assert {n.split("/")[0] for n in list(rows(path, "train"))[:20]} >= {"x", "y"}


def test_a_flat_folder_has_one_class(tmp_path):
    fill(tmp_path / "raw", 20)
    path = make(tmp_path)
    assert labels_of(path) == ["image"]
    assert {label for split in ("train", "validation") for _, label in rows(path, split).values()} \
        == {0}  # fmt: skip
    assert len(rows(path, "validation")) == 2


def test_a_class_may_be_called_test(tmp_path):
    fill(tmp_path / "raw/test", 3)
    fill(tmp_path / "raw/real", 3)
    assert labels_of(make(tmp_path)) == ["real", "test"]


def test_bad_images_are_kept_as_they_are(tmp_path):
    fill(tmp_path / "raw/train", 3)
    fill(tmp_path / "raw/val", 1)
    odd = {"empty.jpg": b"", "text.png": b"no image", "cut.jpeg": image_bytes(9, ".jpg")[:50]}
    for name, data in odd.items():
        (tmp_path / "raw/train" / name).write_bytes(data)
    (tmp_path / "raw/train" / os.fsdecode(b"\xff.jpg")).write_bytes(b"\xff")
    found = rows(make(tmp_path), "train")
    assert {name: found[f"train/{name}"][0] for name in odd} == odd
    assert found["train/\ufffd.jpg"][0] == b"\xff"


def test_a_lone_train_folder_gets_a_held_out_part(tmp_path):
    for name in "ab":
        fill(tmp_path / "raw/train" / name, 20)
    path = make(tmp_path)
    train, held = rows(path, "train"), rows(path, "validation")
    assert len(train) == 36 and len(held) == 4 and not train.keys() & held.keys()
    assert sorted(label for _, label in held.values()) == [0, 0, 1, 1]


def test_links_to_nothing_are_told_and_other_formats_read(tmp_path):
    raw = tmp_path / "raw"
    fill(raw / "a", 2)
    for suffix in ("webp", "bmp", "tiff", "jfif"):
        form = {"jfif": "JPEG"}.get(suffix, suffix)
        Image.new("RGB", (6, 5), "red").save(raw / f"a/x.{suffix}", form)
    (raw / "a/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (raw / "a/movie.gif").write_bytes(b"GIF89a")
    lines = []
    prepared_dir = make(tmp_path, say=lines.append)
    found = rows(prepared_dir, "train") | rows(prepared_dir, "validation")
    assert {name.rpartition(".")[2] for name in found} == {"jpg", "webp", "bmp", "tiff", "jfif"}
    form = Preprocess(image_size=4, channels=3)
    assert all(form.decode(data).shape == (4, 4, 3) for data, _ in found.values())
    assert "skipped: 1 files that are links to nothing" in lines
    assert "skipped: 1 files .gif" in lines


def test_other_files_are_named_and_skipped(tmp_path):
    raw = tmp_path / "raw"
    for split in ("train", "val"):
        fill(raw / split / "a", 2)
    (raw / "train/a/notes.txt").write_text("x")
    (raw / "train/a/.hidden.jpg").write_text("x")
    (raw / "train/loose.jpg").write_text("x")
    fill(raw / "annotations", 3)
    lines = []
    path = make(tmp_path, say=lines.append)
    assert len(rows(path, "train")) == 2
    skipped = {line for line in lines if "skipped" in line}
    assert skipped == {
        "skipped: 1 files .txt",
        "skipped: 1 files beside the class folders",
        "skipped: 3 files in annotations/, which is no split",
    }


def test_changed_folders_are_prepared_again_and_others_are_not(tmp_path):
    fill(tmp_path / "raw/a", 5)
    first = make(tmp_path)
    before = (first / "dataset_info.json").stat().st_mtime_ns
    assert make(tmp_path) == first
    assert (first / "dataset_info.json").stat().st_mtime_ns == before
    (tmp_path / "raw").rename(tmp_path / "moved")
    moved = image_folder.prepare_image_folder(tmp_path / "tfds", tmp_path / "moved")
    assert moved.parent.name.split("-")[1] == first.parent.name.split("-")[1]
    (tmp_path / "moved").rename(tmp_path / "raw")
    os.utime(tmp_path / "raw/a/3.jpg", ns=(5, 5))
    lines = []
    assert make(tmp_path, say=lines.append) == first  # touched: the same files
    assert "the files are those of" in lines[0]
    assert make(tmp_path, say=lines.append) == first and len(lines) == 1  # known from now on
    shutil.copytree(tmp_path / "raw", tmp_path / "copy")
    assert image_folder.prepare_image_folder(tmp_path / "tfds", tmp_path / "copy") == first
    changed = bytearray((tmp_path / "raw/a/3.jpg").read_bytes())
    changed[-3] ^= 1
    (tmp_path / "raw/a/3.jpg").write_bytes(changed)
    second = make(tmp_path)
    assert second != first and first.exists()
    fill(tmp_path / "raw/b", 1)
    assert make(tmp_path) not in (first, second)


def test_two_that_prepare_one_folder_write_it_once(tmp_path, monkeypatch):
    fill(tmp_path / "raw/a", 5)
    lines, paths, begun = [], [], threading.Event()
    written, original = [], shards.write_shard

    def slow(path, records):
        begun.set()
        written.append(path)
        second.start()
        waited.wait(20)
        original(path, records)

    waited = threading.Event()

    def say(line):
        lines.append(line)
        waited.set()

    second = threading.Thread(target=lambda: paths.append(make(tmp_path, say=say)))
    monkeypatch.setattr(
        shards, "write_shard", lambda *a: (original if begun.is_set() else slow)(*a)
    )
    first = make(tmp_path)
    second.join()
    assert paths == [first] and len(written) == 1
    assert lines == [f"{first.parents[1]}: another process is preparing this set; waiting for it"]


def test_a_split_that_is_complete_is_not_done_again(tmp_path, monkeypatch):
    fill(tmp_path / "raw", 20)
    original, written = shards.write_shard, []

    def failing(path, records):
        if written:
            raise OSError("disk full")
        written.append(path.name)
        original(path, records)

    monkeypatch.setattr(shards, "write_shard", failing)
    with pytest.raises(DataError, match="cannot prepare image_folder there.*disk full"):
        make(tmp_path)
    monkeypatch.setattr(
        shards, "write_shard", lambda p, r: (written.append(p.name), original(p, r))
    )
    path = make(tmp_path)
    assert len(written) == len(set(written)) == 2
    assert (len(rows(path, "train")), len(rows(path, "validation"))) == (18, 2)


def test_large_folders_are_prepared_only_on_request(tmp_path, monkeypatch):
    fill(tmp_path / "raw", 3)
    monkeypatch.setattr(folders, "AUTOMATIC_BYTES", 100)
    args = ("image_folder", str(tmp_path / "tfds"), str(tmp_path / "raw"))
    with pytest.raises(DataError, match="not prepared on the way: run `python -m tosa_jax.prepare"):
        open_builder(*args)
    path = make(tmp_path)
    assert open_builder(*args).data_path == path
    name = f"image_folder/{path.parent.name}"
    assert open_builder(name, str(tmp_path / "tfds")).data_path == path


def two_splits(raw: Path) -> None:
    fill(raw / "train/a", 1)
    fill(raw / "val/a", 1)


REFUSED = {
    "No such file or directory.*check source_dir": lambda raw: None,
    "no .jpg, .jpeg, .jfif, .png": lambda raw: raw.mkdir(),
    "raw/b: a class without": lambda raw: (fill(raw / "a", 1), (raw / "b").mkdir()),
    "the splits have different classes: 1 are not in all of train, val, for example 'b'": (
        lambda raw: (two_splits(raw), fill(raw / "val/b", 1))
    ),
    "two folders for the split validation": lambda raw: (
        two_splits(raw), fill(raw / "validation/a", 1)
    ),
    "folders deep": lambda raw: (fill(raw / "a", 1), os.symlink(raw, raw / "a/up")),
    "white space": lambda raw: fill(raw / " a", 1),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused_folders(tmp_path, message):
    REFUSED[message](tmp_path / "raw")
    with pytest.raises(DataError, match=message) as caught:
        make(tmp_path)
    assert str(tmp_path / "raw") in str(caught.value)
    assert not (tmp_path / "tfds").exists()


def test_source_dir_is_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="set it to the folder of images"):
        prepare_own("image_folder", tmp_path)
