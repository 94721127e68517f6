"""ImageNet from tar files: what is written, how it resumes, and what it says of broken files."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.utils import shard_utils

from tosa_jax.data.builders import imagenet, open_builder, shards
from tosa_jax.errors import DataError

CLASSES = ("n01440764", "n02105855", "n15075141")  # labels 0, 230 and 999
COUNTS = {"train": 30, "validation": 9}
LABELS = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()


def jpeg(seed: int, form: str = "JPEG", mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 255, (*rng.integers(4, 40, 2), 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tars(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Writes both tar files of `COUNTS` images; returns file name -> (bytes, label)."""
    folder.mkdir(exist_ok=True)
    names = tfds.builder_cls("imagenet2012")(data_dir="none").info.features["label"].names
    images, outer = {}, {}
    for k, wnid in enumerate(CLASSES):
        inner = {f"{wnid}_{i}.JPEG": jpeg(100 * k + i) for i in range(10)}
        if wnid == "n02105855":  # ImageNet's two kinds of odd files
            inner["n02105855_3.JPEG"] = jpeg(1, "PNG")
            inner["n02105855_4.JPEG"] = jpeg(2, mode="CMYK")
        outer[f"{wnid}.tar"] = tar_bytes(inner)
        images |= {name: (data, names.index(wnid)) for name, data in inner.items()}
    (folder / imagenet.TARS["train"]).write_bytes(tar_bytes(outer))
    numbers = (*range(1, 9), 50_000)
    flat = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(900 + i) for i in numbers}
    # The real one is not in the order of the names either.
    shuffled = dict(sorted(flat.items(), key=lambda pair: pair[1]))
    (folder / imagenet.TARS["validation"]).write_bytes(tar_bytes(shuffled))
    labels = [names.index(LABELS[i - 1]) for i in numbers]
    return images | {n: (d, label) for (n, d), label in zip(flat.items(), labels, strict=True)}


@pytest.fixture
def source(tmp_path):
    write_tars(tmp_path / "tars")
    return tmp_path / "tars"


def prepare(folder: Path, source: Path, counts: dict[str, int] = COUNTS, **options) -> Path:
    options = {"say": lambda line: None} | options
    return imagenet.prepare_imagenet(folder / "tfds", source, expected_counts=counts, **options)


def records(path: Path, split: str) -> list[tuple[str, bytes, int]]:
    builder = tfds.builder_from_directory(str(path))
    rows = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return [(r["file_name"].decode(), r["image"], int(r["label"])) for r in rows]


def test_every_image_is_there_with_its_bytes_and_label(tmp_path):
    wanted = write_tars(tmp_path / "tars")
    path = prepare(tmp_path, tmp_path / "tars")
    assert path == tmp_path / "tfds/imagenet2012/5.1.0"
    rows = [row for split in COUNTS for row in records(path, split)]
    assert sorted((name, data, label) for name, data, label in rows) == sorted(
        (name, data, label) for name, (data, label) in wanted.items()
    )
    assert {label for _, _, label in records(path, "train")} == {0, 230, 999}
    assert not path.with_name("5.1.0.incomplete").exists()
    assert not [p for p in path.iterdir() if p.suffix == ".tmp"]


def test_schema_and_facts_are_tfds_own(tmp_path, source):
    builder = tfds.builder_from_directory(str(prepare(tmp_path, source)))
    stock = tfds.builder_cls("imagenet2012")(data_dir=str(tmp_path / "empty"))
    ours, theirs = builder.info, stock.info
    assert ours.features["label"].names == theirs.features["label"].names
    assert ours.features.to_json() == theirs.features.to_json()
    assert (ours.full_name, ours.module_name) == (theirs.full_name, theirs.module_name)
    assert {name: s.num_examples for name, s in ours.splits.items()} == COUNTS
    opened = open_builder("imagenet2012", str(tmp_path / "tfds"), str(source))
    assert opened.data_path == builder.data_path


@pytest.mark.filterwarnings("ignore")
def test_order_is_tfds_own(tmp_path, source):
    tar = source / imagenet.TARS["train"]
    names = [item.name for item in imagenet.list_images(tar, "train", list(CLASSES), print)]

    class Stock(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"file_name": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((name, {"file_name": name}) for name in names)

    stock = Stock(data_dir=str(tmp_path / "stock"))
    stock.download_and_prepare(file_format="array_record")
    theirs = [row["file_name"].decode() for row in stock.as_data_source("train")]
    assert [name for name, _, _ in records(prepare(tmp_path, source), "train")] == theirs


CHILD = """
import os, signal, sys
from pathlib import Path
from tensorflow_datasets.core.utils import shard_utils
from tosa_jax.data.builders import imagenet, shards
shard_utils.ShardConfig.calculate_number_shards = lambda *args: 5
written = []
def record(*args, original=shards._record):
    written.append(args)
    if len(written) == 9 + 15:  # within the third shard of train
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
shards._record = record
root, source = map(Path, sys.argv[1:])
imagenet.prepare_imagenet(root, source, expected_counts={"train": 30, "validation": 9})
"""


@pytest.mark.subprocess
def test_killed_then_resumed_is_the_same(tmp_path, source, monkeypatch):
    monkeypatch.setattr(shard_utils.ShardConfig, "calculate_number_shards", lambda *args: 5)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "tfds"), str(source)]
    killed = subprocess.run(command, env=env, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    path = tmp_path / "tfds/imagenet2012/5.1.0"
    # The split that was complete is there; the other is not.
    assert [*tfds.builder_from_directory(str(path)).info.splits] == ["validation"]
    begun = path.with_name("5.1.0.incomplete")
    complete = sorted(begun.glob("train-*/*-of-00005"))
    assert len(complete) == 2 and list(begun.glob("train-*/*.tmp"))
    complete[1].write_bytes(complete[1].read_bytes()[:-100])  # as after a power cut
    lines, written = [], []
    original = shards.write_shard
    monkeypatch.setattr(
        shards, "write_shard", lambda p, rows: (written.append(p), original(p, rows))
    )
    prepare(tmp_path, source, say=lines.append)
    assert len(written) == 4 and "train: 1 of 5 shards are there already" in lines
    assert "validation: complete already, 9 examples" in lines
    prepare(tmp_path / "fresh", source)
    for split in COUNTS:
        fresh = tmp_path / "fresh/tfds/imagenet2012/5.1.0"
        assert records(path, split) == records(fresh, split)
        lengths = tfds.builder_from_directory(str(path)).info.splits[split].shard_lengths
        assert len(lengths) == 5 and sum(lengths) == COUNTS[split]
    assert not begun.exists()
    assert json.loads((path / "dataset_info.json").read_text())["fileFormat"] == "array_record"


def test_a_shard_counts_only_with_all_its_records(tmp_path):
    shards.write_shard(tmp_path / "shard", [b"a", b"b"])
    assert shards.has_records(tmp_path / "shard", 2)
    assert not shards.has_records(tmp_path / "shard", 3)
    assert not shards.has_records(tmp_path / "other", 0)


def test_begun_shards_of_other_files_are_dropped(tmp_path, source, monkeypatch):
    def full(path, rows):
        raise OSError("disk full")

    monkeypatch.setattr(shards, "write_shard", full)
    with pytest.raises(OSError, match="disk full"):
        prepare(tmp_path, source)
    monkeypatch.undo()
    os.utime(source / imagenet.TARS["validation"], ns=(1, 1))
    lines = []
    prepare(tmp_path, source, say=lines.append)
    assert any("the source files changed" in line for line in lines)


def test_one_tar_file_is_enough_and_the_other_can_follow(tmp_path, source, monkeypatch):
    train = source / imagenet.TARS["train"]
    train.rename(source / "later")
    path = prepare(tmp_path, source)
    assert [*tfds.builder_from_directory(str(path)).info.splits] == ["validation"]
    (source / "later").rename(train)
    (source / imagenet.TARS["validation"]).unlink()
    assert prepare(tmp_path, source) == path
    splits = tfds.builder_from_directory(str(path)).info.splits
    assert {name: s.num_examples for name, s in splits.items()} == COUNTS
    assert len(records(path, "validation")) == 9
    before = (path / "dataset_info.json").stat().st_mtime_ns
    prepare(tmp_path, source)
    assert (path / "dataset_info.json").stat().st_mtime_ns == before
    monkeypatch.setattr(shard_utils.ShardConfig, "calculate_number_shards", lambda *args: 2)
    prepare(tmp_path, source, overwrite=True)
    splits = tfds.builder_from_directory(str(path)).info.splits
    assert {name: s.num_examples for name, s in splits.items()} == COUNTS
    assert len(records(path, "train")) == 30 and len(splits["train"].shard_lengths) == 2
    assert len(list(path.glob("*.array_record-*"))) == 2 + 1


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


BAD = {
    "no plain tar file, or truncated": ("train", lambda data: cut(data, 0.5)),
    "no plain tar file, or truncated .empty": ("train", lambda data: b""),
    "no plain tar file": ("validation", lambda data: b"<html>" * 500),
    "9 images of 9 classes, but 10 are expected": ("validation", None),
    "is not the tar file of a known class": ("train", lambda _: tar_bytes({"n0.tar": b""})),
    "n01_1.JPEG in n01440764.tar is not of that": (
        "train", lambda _: tar_bytes({"n01440764.tar": tar_bytes({"n01_1.JPEG": b"x"})})
    ),
    "n01440764.tar is not a validation image": (
        "validation", lambda _: tar_bytes({"n01440764.tar": b""})
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_tars_are_refused_before_anything_is_written(tmp_path, source, message):
    split, change = BAD[message]
    tar, counts = source / imagenet.TARS[split], dict(COUNTS)
    if change is None:
        counts["validation"] = 10
    else:
        tar.write_bytes(change(tar.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        prepare(tmp_path, source, counts)
    assert str(tar) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "tfds").exists()


def test_other_refusals(tmp_path, source, monkeypatch):
    with pytest.raises(DataError, match="neither ILSVRC2012_img_val.tar nor"):
        prepare(tmp_path, tmp_path)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(DataError, match="GB are needed, 0.0 GB are free; set data_dir"):
        prepare(tmp_path, source)
    monkeypatch.undo()
    copy = tmp_path / "tfds/imagenet2012/5.1.0/imagenet2012-train.tfrecord-00000-of-00001"
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(b"mine")
    with pytest.raises(DataError, match="holds a TFRecord copy already"):
        prepare(tmp_path, source, overwrite=True)
    assert copy.read_bytes() == b"mine"
    with pytest.raises(DataError, match="not prepared in.*tosa_jax.prepare"):
        open_builder("imagenet2012", str(tmp_path / "tfds"), str(source))
