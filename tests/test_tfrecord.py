"""TFRecord copies to ArrayRecord: the checksums, the records, resuming, and damaged files."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from tosa_jax.data.builders import prepare, prepare_own, prepared_dir, tfrecord
from tosa_jax.errors import DataError


def crc32c(data: bytes) -> int:
    """Bit by bit, as the definition goes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def frame(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def write_copy(folder: Path, digits: Path) -> tuple[Path, dict[str, list[bytes]]]:
    """The digits as TFDS writes them as TFRecord, in three files a split; 50 records of each."""
    path, rows = folder / "birds/2.0.0", {}
    path.mkdir(parents=True)
    for name in ("features.json", "label.labels.txt"):
        (path / name).write_bytes((digits / name).read_bytes())
    info = json.loads((digits / "dataset_info.json").read_text())
    info |= {"fileFormat": "tfrecord", "name": "birds", "version": "2.0.0"}
    for split in info["splits"]:
        name = split["name"]
        reader = ArrayRecordReader(str(digits / f"digits-{name}.array_record-00000-of-00001"))
        rows[name] = reader.read(list(range(50)))
        split["shardLengths"] = ["20", "0", "30"]
        for i, part in enumerate((rows[name][:20], [], rows[name][20:])):
            file = path / f"birds-{name}.tfrecord-0000{i}-of-00003"
            file.write_bytes(b"".join(map(frame, part)))
    (path / "dataset_info.json").write_text(json.dumps(info))
    return path, rows


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return prepare_own("digits", tmp_path_factory.mktemp("digits"))


def stored(path: Path, split: str) -> list[bytes]:
    files = sorted(path.glob(f"*-{split}.array_record-*"))
    readers = [ArrayRecordReader(str(file)) for file in files]
    return [row for r in readers if r.num_records() for row in r.read_all()]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 31, 1000, 4095, 70_001])
def test_crc32c(size):
    data = np.random.default_rng(size).bytes(size)
    assert tfrecord.crc32c(data) == crc32c(data)
    assert tfrecord.crc32c(bytes(size)) == crc32c(bytes(size))
    assert tfrecord.crc32c(b"123456789") == 0xE3069283  # RFC 3720's test value


def test_conversion_keeps_records_and_originals(tmp_path, digits):
    path, rows = write_copy(tmp_path, digits)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    assert prepare("birds", tmp_path, say=lambda line: None) == path
    assert {split: stored(path, split) for split in rows} == rows
    after = {p.name: p.read_bytes() for p in path.iterdir()}
    assert all(after[name] == data for name, data in before.items() if name[-4:] != "json")
    builder = tfds.builder_from_directory(str(path))
    assert [f.value for f in builder.info.available_file_formats()] != ["tfrecord"]
    source = builder.as_data_source("train")
    assert len(source) == 50 and source[49]["image"].shape == (8, 8, 1)
    assert prepared_dir("birds", tmp_path) == path
    assert len(after) == len(before) + 6  # nothing else is left behind


def test_resumed_conversion_does_only_what_is_missing(tmp_path, digits, monkeypatch):
    path, rows = write_copy(tmp_path, digits)
    original, written = tfrecord.write_shard, []

    def failing(target, records):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(target.name)
        original(target, records)

    monkeypatch.setattr(tfrecord, "write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare("birds", tmp_path)
    with pytest.raises(DataError, match="exists only as tfrecord"):
        prepared_dir("birds", tmp_path)
    monkeypatch.setattr(
        tfrecord, "write_shard", lambda t, r: (written.append(t.name), original(t, r))
    )
    prepare("birds", tmp_path)
    assert len(written) == len(set(written)) == 6
    assert {split: stored(path, split) for split in rows} == rows
    prepare("birds", tmp_path)
    assert len(written) == 6
    prepare("birds", tmp_path, overwrite=True)
    assert len(written) == 12 and len(list(path.glob("*.tfrecord-*"))) == 6


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:-1], "truncated in the record at byte"),
        (lambda d: d + b"abc", "truncated at byte"),
        (lambda d: flip(d, 0), "damaged length at byte 0"),
        (lambda d: flip(d, 40), "damaged record at byte 0"),
        (lambda d: flip(d, len(d) - 1), "damaged record at byte"),
        (lambda d: d + frame(b"more"), "21 records, but dataset_info.json says 20"),
        (lambda d: b"", "0 records, but dataset_info.json says 20"),
        (None, "no such file, though dataset_info.json"),
    ],
)
def test_damaged_files(tmp_path, digits, change, message):
    path, _ = write_copy(tmp_path, digits)
    file = path / "birds-test.tfrecord-00000-of-00003"
    file.write_bytes(change(file.read_bytes())) if change else file.unlink()
    with pytest.raises(DataError, match=message) as caught:
        prepare("birds", tmp_path)
    assert str(file) in str(caught.value)
    assert not (path / file.name.replace("tfrecord", "array_record")).exists()
    assert not list(path.glob("*.tmp"))
    with pytest.raises(DataError, match="exists only as tfrecord"):
        prepared_dir("birds", tmp_path)


def test_the_originals_may_be_deleted_afterwards(tmp_path, digits):
    path, rows = write_copy(tmp_path, digits)
    prepare("birds", tmp_path)
    for file in path.glob("*.tfrecord-*"):
        file.unlink()
    assert prepare("birds", tmp_path) == path
    assert len(tfds.builder_from_directory(str(path)).as_data_source("test")) == len(rows["test"])
