"""Image sets in IDX files, MNIST's format (MNIST, Fashion-MNIST, KMNIST, ...), as a TFDS builder.

An IDX file has two zero bytes, a type code (8: unsigned byte), the number of dimensions (one byte),
each dimension as a big-endian uint32, then the values.
"""

import dataclasses
import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tosa_jax.data.builders.generated import GeneratedSet, small_png
from tosa_jax.errors import DataError

_FILES = {  # split -> (images, labels), each with or without .gz
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_CLASS_NAMES = {  # classes of other sets are called by their numbers
    "fashion_mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
}
_AGAIN = "copy or download the file again"

MOST_BYTES = 2**30
"""An array of more bytes is refused: a small gzip file can hold any number of them."""

MOST_DIMENSIONS = 8


def read_idx(path: str | Path) -> np.ndarray:
    """The uint8 array, of any rank, in an IDX file, gzip-compressed if its name ends in .gz.

    Raises:
      DataError: the file is missing, is not gzip, is not IDX of unsigned bytes, is cut short, or
        holds more than its header says; or it holds more than `MOST_BYTES`.
    """
    path = Path(path)
    data = _read_bytes(path)
    # A file shorter than the magic number counts as truncated if it begins as an IDX file does.
    if data[:3] != b"\x00\x00\x08"[: len(data)] or (len(data) > 3 and data[3] == 0):
        raise DataError(
            f"{path}: not an IDX file of unsigned bytes: it begins with 0x{data[:4].hex()}, not "
            f"0x000008 and a rank; {_AGAIN}"
        )
    rank = data[3] if len(data) > 3 else 0
    start = 4 + 4 * rank
    if len(data) < max(start, 4):
        raise DataError(f"{path}: truncated within its header ({len(data)} bytes); {_AGAIN}")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", count=rank, offset=4))
    if rank > MOST_DIMENSIONS or math.prod(max(n, 1) for n in shape) > MOST_BYTES:
        raise DataError(
            f"{path}: the header says {rank} dimensions, {shape[:MOST_DIMENSIONS]}; at most {MOST_DIMENSIONS} "
            f"dimensions and {MOST_BYTES} values are read; {_AGAIN}"
        )
    count = math.prod(shape)
    if len(data) - start < count:
        raise DataError(
            f"{path}: truncated: the header says {shape}, that is {count} values, but "
            f"{len(data) - start} follow it; {_AGAIN}"
        )
    if len(data) - start > count:
        raise DataError(
            f"{path}: {len(data) - start - count} trailing bytes after the {count} values of "
            f"{shape} that the header says; {_AGAIN}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        if path.suffix != ".gz":
            return raw
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            head = file.read(4 + 4 * MOST_DIMENSIONS)
            # No more than the header says, and a few bytes that tell what follows: see `MOST_BYTES`.
            return head + file.read(_claimed_bytes(head) + 64)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check source_dir") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: truncated or broken gzip file ({error}); {_AGAIN}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check source_dir") from None


def _claimed_bytes(head: bytes) -> int:
    """How many values the header of an IDX file says; 0 if it is none or too large."""
    rank = head[3] if len(head) > 3 else 0
    if not 0 < rank <= MOST_DIMENSIONS or len(head) < 4 + 4 * rank:
        return 0
    count = math.prod(int(n) for n in np.frombuffer(head, ">u4", count=rank, offset=4))
    return count if count <= MOST_BYTES else 0


def read_split(source_dir: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, height, width] and labels uint8 [n] of "train" or "test".

    Raises:
      DataError: as `read_idx`; or an array has another number of dimensions, there are no images,
        or the numbers of images and labels differ.
    """
    image_path, label_path = (_find(source_dir, stem) for stem in _FILES[split])
    images, labels = read_idx(image_path), read_idx(label_path)
    for path, array, rank in ((image_path, images, 3), (label_path, labels, 1)):
        if array.ndim != rank:
            raise DataError(
                f"{path}: an array of shape {array.shape}, but {rank} dimensions are expected "
                f"here; check that the image and label files are not swapped"
            )
    if len(images) != len(labels) or not len(images):
        raise DataError(
            f"{image_path}: {len(images)} images, but {label_path.name} has {len(labels)} labels; "
            f"take both files from the same data set"
        )
    return images, labels


def fingerprint(source_dir: str | Path) -> str:
    """Eight hexadecimal digits that depend on the content of the four files.

    Raises:
      DataError: a file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    for stem in (stem for pair in _FILES.values() for stem in pair):
        path = _find(source_dir, stem)
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check its mode") from None
    return digest.hexdigest()[:8]


def _find(source_dir: str | Path, stem: str) -> Path:
    folder = Path(source_dir).expanduser()
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"{folder}: no {stem} or {stem}.gz; set source_dir to the folder with the four IDX files"
    )


@dataclasses.dataclass
class IdxConfig(tfds.core.BuilderConfig):
    """A data set in IDX files: their folder, the size of an image (height, width), and the classes."""

    source_dir: str = ""
    image_shape: tuple[int, int] = (28, 28)
    class_names: tuple[str, ...] = ()


def idx_config(name: str, source_dir: str | Path) -> IdxConfig:
    """Describes a set after reading and checking all four files: a broken one is found before anything is written.

    Raises:
      DataError: as `read_split`; or train and test images have different sizes, or a label has no
        class name.
    """
    (train_x, train_y), (test_x, test_y) = (read_split(source_dir, split) for split in _FILES)
    if train_x.shape[1:] != test_x.shape[1:]:
        raise DataError(
            f"{source_dir}: train images are {train_x.shape[1:]}, test images {test_x.shape[1:]}; "
            f"take all four files from the same data set"
        )
    highest = int(max(train_y.max(), test_y.max()))
    # At least ten: a subset of a set of digits still has ten classes.
    names = _CLASS_NAMES.get(name, tuple(str(i) for i in range(max(highest + 1, 10))))
    if highest >= len(names):
        raise DataError(
            f"{source_dir}: label {highest}, but {name} has {len(names)} classes; check that the "
            f"files are {name}'s, or call the set by another name"
        )
    return IdxConfig(
        name=config_name(name, source_dir),
        description=f"{name}, from IDX files.",
        source_dir=str(Path(source_dir).expanduser()),
        image_shape=train_x.shape[1:],
        class_names=names,
    )


def config_name(name: str, source_dir: str | Path) -> str:
    """The data set's name and the fingerprint of its files, for example "fashion_mnist-1a2b3c4d".

    So changed files make another prepared set: no stale one is read, and none is deleted while a
    run still reads it.
    """
    return f"{name}-{fingerprint(source_dir)}"


class Idx(GeneratedSet):
    """TFDS set "idx/<config name>": image uint8 [height, width, 1], label; splits train, test."""

    SPLITS = ("train", "test")

    def describe(self) -> tuple[str, dict[str, Any]]:
        config: IdxConfig = self.settings
        return config.description or "", {
            "image": tfds.features.Image(shape=(*config.image_shape, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(config.class_names)),
        }

    def examples(self, split: str) -> Iterator[dict[str, Any]]:
        for image, label in zip(*read_split(self.settings.source_dir, split), strict=True):
            yield {"image": small_png(image), "label": int(label)}
