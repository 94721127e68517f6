"""Writes image files, or images inside tar files, to a TFDS folder of ArrayRecord shards.

TFDS's own writer copies every example to a temporary file and back, and a stopped one starts from
the beginning. Here all images are listed before any is read. Each shard is then read, written and
renamed on its own, so that a finished shard stays finished. Order, number and lengths of the shards
are TFDS's: examples are sorted by the hash of their key, salted with the split's name. So a slice
such as "train[:10%]" is a random sample, and the same one as in a copy that TFDS made.
"""

import functools
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core import example_serializer, hashing, splits
from tensorflow_datasets.core.utils import shard_utils

from tosa_jax.data.builders.prepared import open_prepared
from tosa_jax.errors import DataError

Say = Callable[[str], object]

WRITER_OPTIONS = "group_size:1"  # one record in a group, so that any record can be read alone
_READERS = 8  # threads: reading from a network disk is mostly waiting
_SAY_EVERY_S = 10.0


class Item(NamedTuple):
    """One example, not read yet.

    name      its key in TFDS, and file name.
    label     its class.
    path      the file with its bytes: `size` bytes from `offset` on.
    mtime_ns  modification time of that file, nanoseconds.
    beside    a second file of the example (its `label` is not used); None: there is none.
    """

    name: str
    label: int
    path: str
    offset: int
    size: int
    mtime_ns: int
    beside: "Item | None" = None


Encode = Callable[[Item, list[bytes]], dict]
"""Makes the features of an example from an item and the bytes of its file, and of the one beside it."""


def labelled(item: Item, files: list[bytes]) -> dict:
    """The `Encode` of image classification: "image", "label" and "file_name"."""
    return {"image": files[0], "label": item.label, "file_name": item.name}


class Progress:
    """Reports progress: the first line, then at most one every ten seconds, and the last if bytes are counted."""

    def __init__(self, say: Say, what: str) -> None:
        self._say, self._what = say, what
        self._start = time.monotonic()
        self._last = -_SAY_EVERY_S

    def __call__(self, text: str, done_bytes: int = 0, all_bytes: int = 0) -> None:
        """Reports `text`, and with the bytes done and to do also the speed and the time left."""
        now = time.monotonic()
        if now - self._last < _SAY_EVERY_S and not (all_bytes and done_bytes == all_bytes):
            return
        self._last = now
        if done_bytes:
            speed = done_bytes / max(now - self._start, 1e-3)
            left = (all_bytes - done_bytes) / speed / 60
            text += f", {done_bytes / 1e9:.2f} of {all_bytes / 1e9:.2f} GB"
            text += f", {speed / 1e6:.0f} MB/s, {left:.0f} min left"
        self._say(f"{self._what}: {text}")


def digest(items: Iterable[Item]) -> str:
    """Eight hexadecimal digits that depend on names, labels, offsets, sizes and modification times."""
    total = hashlib.sha256()
    for item in items:
        # Without the path: a folder that was moved is the same set.
        total.update(repr((item.name, item.label, *item[3:6])).encode())
        if item.beside:
            total.update(repr((item.beside.name, *item.beside[3:6])).encode())
    return total.hexdigest()[:8]


def write_set(
    path: Path,
    info: tfds.core.DatasetInfo,
    items: Mapping[str, list[Item]],
    say: Say,
    *,
    encode: Encode = labelled,
    growth: float = 1.0,
    overwrite: bool = False,
) -> None:
    """Writes the splits that a version folder does not have yet. A split appears when it is complete.

    Args:
      path: The version folder, .../1.0.0. Finished shards of unfinished splits lie beside it, in
        .../1.0.0.incomplete. The next call uses them if the source files are the same.
      info: Name, version and features of the set.
      items: Split -> its examples, none empty.
      encode: Makes an example with the features of `info`.
      growth: Size of an example in the shard, relative to its files.
      overwrite: Also make splits again that are there. The old one stays until the new is complete.
    Raises:
      DataError: the disk is too small, or a file has changed since it was listed.
      OSError: the folder cannot be written.
    """
    work = path.with_name(f"{path.name}.incomplete")
    for split, examples in items.items():
        if split in prepared_splits(path) and not overwrite:
            continue
        lengths = _write_split(work, info, split, examples, say, encode, growth)
        size = num_bytes(examples, growth)
        _publish(path, work, info, splits.SplitInfo(split, lengths, size))
    shutil.rmtree(work, ignore_errors=True)


def prepared_splits(path: Path) -> Mapping[str, splits.SplitInfo]:
    """The complete splits of a version folder by name; empty if there is no such folder."""
    if not (path / "dataset_info.json").is_file():
        return {}
    return open_prepared(path).info.splits


def num_bytes(items: Iterable[Item], growth: float = 1.0) -> int:
    """Size of the items' files, times `growth`."""
    files = (file for item in items for file in (item, item.beside) if file)
    return round(growth * sum(file.size for file in files))


def _write_split(
    work: Path,
    info: tfds.core.DatasetInfo,
    split: str,
    items: list[Item],
    say: Say,
    encode: Encode,
    growth: float,
) -> list[int]:
    """Writes the shards that are not there yet. Returns the number of examples in each shard."""
    folder = work / f"{split}-{digest(items)}"
    for other in work.glob(f"{split}-*"):
        if other != folder:
            say(f"{split}: the source files changed since {other.name} was begun: it is dropped")
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    plan = _plan(folder, info.name, split, items, growth)
    missing = [(path, part) for path, part in plan if not has_records(path, len(part))]
    all_bytes = sum(num_bytes(part, growth) for _, part in missing)
    _check_space(work, all_bytes)
    if len(missing) < len(plan):
        say(f"{split}: {len(plan) - len(missing)} of {len(plan)} shards are there already")
    features: Any = info.features
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    progress, done_bytes = Progress(say, split), 0
    with ThreadPoolExecutor(_READERS) as pool:
        for i, (path, part) in enumerate(missing, len(plan) - len(missing) + 1):
            # Read in the order of the source files: several times faster on a hard disk.
            order = sorted(range(len(part)), key=lambda j, part=part: part[j][2:4])
            read = functools.partial(_example, encode)
            examples = dict(zip(order, pool.map(read, (part[j] for j in order)), strict=True))
            records = (_record(serializer, features, examples.pop(j)) for j in range(len(part)))
            write_shard(path, records)
            done_bytes += num_bytes(part, growth)
            progress(f"{i} of {len(plan)} shards", done_bytes, all_bytes)
    return [len(part) for _, part in plan]


def _plan(
    folder: Path, name: str, split: str, items: list[Item], growth: float
) -> list[tuple[Path, list[Item]]]:
    """The file of each shard and its examples, in TFDS's order."""
    hasher = hashing.Hasher(split)
    shuffled = sorted(items, key=lambda item: hasher.hash_key(item.name))
    size = num_bytes(items, growth)
    count = shard_utils.ShardConfig.calculate_number_shards(size, len(items))
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder), dataset_name=name, split=split, filetype_suffix="array_record"
    )
    ends = shard_utils.get_shard_boundaries(len(items), count)
    starts = [0, *ends[:-1]]
    parts = [shuffled[start:end] for start, end in zip(starts, ends, strict=True)]
    return list(zip(map(Path, template.sharded_filepaths(count)), parts, strict=True))


def read_files(item: Item) -> list[bytes]:
    """The bytes of an item's file, and of the one beside it. Raises DataError: one cannot be read or has changed."""
    return [_read(file) for file in (item, item.beside) if file]


def _example(encode: Encode, item: Item) -> dict:
    return encode(item, read_files(item))


def _read(item: Item) -> bytes:
    try:
        with open(item.path, "rb", buffering=0) as file:
            file.seek(item.offset)
            data = file.read(item.size)
    except OSError as error:
        raise DataError(f"{item.path}: cannot be read ({error.strerror})") from None
    if len(data) != item.size:
        raise DataError(
            f"{item.path}: {item.name} has {len(data)} bytes, not the {item.size} it had when it "
            f"was listed; prepare again when the files no longer change"
        )
    return data


def _record(
    serializer: example_serializer.ExampleSerializer, features: Any, example: dict
) -> bytes:
    return serializer.serialize_example(features.encode_example(example))


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Writes an ArrayRecord file under a temporary name, and renames it when it is on the disk."""
    # The name holds host and process: two of them may prepare the same set at the same time.
    unfinished = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        writer = ArrayRecordWriter(str(unfinished), WRITER_OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def has_records(path: Path, count: int) -> bool:
    """Whether `path` is an ArrayRecord file of `count` records."""
    if not path.is_file():
        return False
    try:
        reader = ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError):
        return False
    return found == count


def _check_space(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if free < needed:
        raise DataError(
            f"{work}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; set data_dir "
            f"to a larger disk"
        )


def _publish(path: Path, work: Path, info: tfds.core.DatasetInfo, split: splits.SplitInfo) -> None:
    """Moves the shards of a complete split to the version folder, then adds the split to its description."""
    path.mkdir(parents=True, exist_ok=True)
    old = set(path.glob(f"{info.name}-{split.name}.array_record-*"))
    for shard in sorted(work.glob(f"{split.name}-*/*.array_record-*-of-*[0-9]")):
        os.replace(shard, path / shard.name)
        old.discard(path / shard.name)
    known = {name: s.replace(filename_template=None) for name, s in prepared_splits(path).items()}
    info.set_splits(splits.SplitDict([*(known | {split.name: split}).values()]))
    with tempfile.TemporaryDirectory(dir=work) as folder:
        info.write_to_directory(folder)
        # Readers find the split by this file, so it is moved last.
        last = "dataset_info.json"
        for name in (*sorted({*os.listdir(folder)} - {last}), last):
            os.replace(Path(folder) / name, path / name)
    for shard in old:
        shard.unlink()
