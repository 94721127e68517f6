"""Files of data sets for `tests.hostile`: small whole files, how they are read, and files made to do harm."""

import gzip
import io
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.hostile_format import Format, zeros


def idx_file(shape: tuple[int, ...]) -> bytes:
    """An IDX file of zeros."""
    return (
        b"\0\0\x08"
        + bytes([len(shape)])
        + struct.pack(f">{len(shape)}I", *shape)
        + bytes(int(np.prod(shape)))
    )


def read_idx_file(content: bytes, folder: Path) -> None:
    from tosa_jax.data.builders.idx import read_idx

    path = folder / ("a.gz" if content[:2] == b"\x1f\x8b" else "a")
    path.write_bytes(content)
    array = read_idx(path)
    assert array.dtype == np.uint8 and array.nbytes < 2**31


def idx() -> Format:
    samples = [idx_file((3, 5, 4)), idx_file((7,)), gzip.compress(idx_file((3, 5, 4)))]
    head = b"\x1f\x8b\x08\0\0\0\0\0\0\0"
    bombs = (
        gzip.compress(idx_file((2,))[:-2])[:-8] + b"",
        zeros(3000, 31),
        head + zeros(3000, -15),
        gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 2**31, 1, 1) + bytes(100)),
        b"\0\0\x08\xff" + b"\xff" * 1020,
        b"\0\0\x08\xff" + b"\xff\xff\xff\xff" * 254 + bytes(4),
        b"\0\0\x08\x03" + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 0),
    )
    return Format(samples, read_idx_file, 10, bombs)


def frame(data: bytes) -> bytes:
    """A record of a TFRecord file."""
    from tosa_jax.data.builders.tfrecord import masked_crc32c

    length = struct.pack("<Q", len(data))
    ends = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + ends[0] + data + ends[1]


def tfrecord() -> Format:
    records = [bytes([i]) * (5 * i) for i in range(6)]

    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.data.builders.tfrecord import read_tfrecord

        (folder / "a").write_bytes(content)
        found = list(read_tfrecord(folder / "a"))
        # A mutation may copy or drop whole records: what is read is one of them, and nothing else.
        assert all(record in records for record in found)

    length = struct.pack("<Q", 2**62)
    bomb = length + frame(b"")[8:12]
    from tosa_jax.data.builders.tfrecord import masked_crc32c

    claims = length + struct.pack("<I", masked_crc32c(length))
    return Format([b"".join(map(frame, records))], read, 10, (bomb, claims, b""))


def read_split(folder: Path) -> None:
    """Reads both splits of the set of digits below a folder."""
    from tosa_jax.data.builders.prepared import open_prepared
    from tosa_jax.data.labelled import LabelledImages
    from tosa_jax.data.pipeline import DataConfig, Dataset
    from tosa_jax.data.sources import Encoded, EvalExamples

    builder = open_prepared(folder)
    config = DataConfig(name="digits", data_dir=str(folder), image_size=8, channels=1)
    dataset = Dataset(config, builder)
    for split in ("train", "test"):
        count = dataset.num_examples(split)
        kind = dataset.split_kind(split, train=False)
        assert isinstance(kind, LabelledImages)
        source = EvalExamples(Encoded(builder, split, kind), 2)
        assert len(source) - count in (0, 1)
        for i in range(min(len(source), 8)):
            example = source[i]
            assert example["image"].shape == (8, 8, 1) and 0 <= example["label"] < len(
                dataset.facts.class_names
            )


def small_set(folder: Path) -> None:
    """Eight digits in each split, prepared in this folder."""
    import tensorflow_datasets as tfds

    from tosa_jax.data.builders import shards
    from tosa_jax.data.builders.folders import FolderSet, prepare_folder

    raw = folder / "raw"
    raw.mkdir(parents=True)
    items = []
    for i in range(8):
        pixels = np.full((8, 8), 30 * i, np.uint8)
        Image.fromarray(pixels).save(raw / f"{i}.png")
        items.append(
            shards.Item(
                f"{i}.png", i % 3, str(raw / f"{i}.png"), 0, (raw / f"{i}.png").stat().st_size, 0
            )
        )
    features = {
        "image": tfds.features.Image(shape=(8, 8, 1)),
        "label": tfds.features.ClassLabel(names=list("abc")),
    }

    def encode(item: Any, files: list[bytes]) -> dict:
        return {"image": files[0], "label": item.label}

    found = FolderSet(
        "digits", "Digits.", features, {"train": items[:6], "test": items[6:]}, encode
    )
    path = prepare_folder(
        found, folder, raw, max_bytes=None, overwrite=False, say=lambda line: None
    )
    path.rename(folder / "set")


def of_set(name: str, share: float, **options: Any) -> Callable[[], Format]:
    """The format of one file of a prepared set; the others are whole."""

    def make() -> Format:
        with tempfile.TemporaryDirectory() as folder:
            # Another process: the threads that ArrayRecord starts are not there in the children of this one.
            if (pid := os.fork()) == 0:
                small_set(Path(folder) / "a")
                os._exit(0)
            os.waitpid(pid, 0)
            found = (Path(folder) / "a/set").iterdir()
            files = {p.name: p.read_bytes() for p in found if p.is_file()}
        name_of = next(x for x in files if x.startswith(name))

        def start(own: Path) -> None:
            for other, data in files.items():
                (own / other).write_bytes(data)

        def read(content: bytes, own: Path) -> None:
            (own / name_of).write_bytes(content)
            read_split(own)

        return Format([files[name_of]], read, share, start=start, **options)

    return make


IMPORTS = tuple(
    json.dumps({"pythonClassName": name, "featuresDict": {"features": {}}}).encode()
    for name in ("antigravity.X", "this.X")
)
"""Features of a set that name a module of someone else's."""


def hdf5() -> Format:
    import h5py

    from tosa_jax.data.builders import nyu

    def written(**arrays: np.ndarray) -> bytes:
        file = io.BytesIO()
        with h5py.File(file, "w") as f:
            for key, x in arrays.items():
                f.create_dataset(key, data=x, compression="gzip" if x.size > 1000 else None)
        return file.getvalue()

    def claims(shape: tuple[int, ...], dtype: Any = np.uint8) -> bytes:
        file = io.BytesIO()
        with h5py.File(file, "w") as f:
            f.create_dataset("rgb", shape, dtype, chunks=tuple(min(n, 64) for n in shape))
            f["depth"] = np.zeros((480, 640), np.float32)
        return file.getvalue()

    def linked() -> bytes:
        file = io.BytesIO()
        with h5py.File(file, "w") as f:
            f["rgb"] = h5py.ExternalLink("/etc/hostname", "/rgb")
            f.create_dataset(
                "depth", (480, 640), np.float32, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
            )
        return file.getvalue()

    rgb, depth = np.zeros((3, 480, 640), np.uint8), np.ones((480, 640), np.float32)
    outside = io.BytesIO()
    with h5py.File(outside, "w") as f:
        f["rgb"] = rgb
        f.create_dataset(
            "depth", (480, 640), np.float32, external=[("/dev/zero", 0, 480 * 640 * 4)]
        )
    bombs = (claims((10**6, 10**6, 10**3)), claims((3, 10**5, 10**5)), linked(), outside.getvalue())
    bombs += (claims((3, 480, 640), "S100"), claims((3, 480, 640), h5py.string_dtype()), b"")

    def read(content: bytes, _: Path) -> None:
        from tosa_jax.data.builders.shards import Item

        found = nyu._example(Item("a", 0, "a.h5", 0, 0, 0), [content])
        assert found["depth"].shape == (480, 640) and found["depth"].dtype == np.float16

    small = written(rgb=np.zeros((3, 4, 6), np.uint8), depth=np.ones((4, 6), np.float32))
    return Format([written(rgb=rgb, depth=depth), small], read, 3, bombs)


def class_names() -> Format:
    def read(content: bytes, folder: Path) -> None:
        from tosa_jax.data.class_names import read_names

        (folder / "classes.txt").write_bytes(content)
        assert isinstance(read_names(folder / "classes.txt"), tuple)

    return Format(["digit 0\ndigit 1\nzwölf\n".encode()], read, 2)
