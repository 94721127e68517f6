"""What the builders of a person's own folders share: names of splits, and how listed files become a prepared set."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from tosa_jax.data.builders.shards import (
    Encode,
    Item,
    Say,
    digest,
    num_bytes,
    prepared_splits,
    write_set,
)
from tosa_jax.errors import DataError

VERSION = "1.0.0"
"""Of the sets of all folders."""

EXTENSIONS = (".jpg", ".jpeg", ".png")
"""Files with these names, in lower or upper case, are images."""

AUTOMATIC_BYTES = 2_000_000_000
"""A larger folder is prepared by the command alone, not on the way to training."""

SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
"""Names of folders and lists -> TFDS's names of splits."""

_VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class FolderSet:
    """What a folder becomes.

    name         the set's folder under `data_dir`.
    description  one sentence.
    features     TFDS features: the input first, then what is predicted.
    items        split -> its examples, none empty.
    encode       an item and the bytes of its files -> an example.
    """

    name: str
    description: str
    features: Mapping[str, Any]
    items: Mapping[str, list[Item]]
    encode: Encode


def prepare_folder(
    found: FolderSet,
    data_dir: Path,
    source_dir: Path,
    *,
    max_bytes: int | None,
    overwrite: bool,
    say: Say,
    check_items: Callable[[list[Item]], None] = lambda items: None,
) -> Path:
    """Writes the set of a folder, unless it is prepared already as the folder is now.

    Args:
      max_bytes: Refuse a larger folder; None: any size.
      check_items: Called with all items before anything is written.
    Returns:
      The version folder, data_dir/<set>/<folder's name>-<fingerprint>/1.0.0. The fingerprint
      depends on the relative names, sizes and modification times of the files.
    Raises:
      DataError: the folder is larger than `max_bytes`, the disk is too small, or what `check_items` raises.
      OSError: `data_dir` cannot be written.
    """
    items = [item for split in sorted(found.items) for item in found.items[split]]
    stem = re.sub(r"\W+", "_", source_dir.resolve().name) or "images"
    path = data_dir / found.name / f"{stem}-{digest(items)}" / VERSION
    # A stopped call may have left only some of the splits.
    if not overwrite and not found.items.keys() - prepared_splits(path).keys():
        return path
    size = num_bytes(items)
    if max_bytes is not None and size > max_bytes:
        raise DataError(
            f"{source_dir}: {size / 1e9:.1f} GB of images are not prepared on the way: run "
            "`python -m tosa_jax.prepare --config=...` with the same options first"
        )
    check_items(items)
    info = _info(found, path)
    write_set(path, info, found.items, say, encode=found.encode, overwrite=overwrite)
    return path


def file_item(path: Path, root: Path) -> Item:
    """The item of a whole file, called by its path relative to `root`; its label is 0."""
    stat = path.stat()
    return Item(path.relative_to(root).as_posix(), 0, str(path), 0, stat.st_size, stat.st_mtime_ns)


def hold_out(items: list[Item]) -> dict[str, list[Item]]:
    """Divides items into "train" and "validation", a tenth, by a hash of their names.

    Of two items or more, each part gets at least one; a single item is for "train".
    """
    hasher = hashing.Hasher("split")
    shuffled = sorted(items, key=lambda item: hasher.hash_key(item.name))
    count = round(len(items) * _VALIDATION_SHARE)
    if len(items) > 1:
        count = max(count, 1)
    parts = {"validation": shuffled[:count], "train": shuffled[count:]}
    return {split: part for split, part in parts.items() if part}


def _info(found: FolderSet, path: Path) -> tfds.core.DatasetInfo:
    identity = DatasetIdentity(
        name=found.name,
        version=tfds.core.Version(VERSION),
        data_dir=str(path),
        module_name=f"{__package__}.{found.name}",
        config_name=path.parent.name,
        release_notes={VERSION: "First version."},
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=found.description,
        features=tfds.features.FeaturesDict(dict(found.features)),
        supervised_keys=tuple(found.features)[:2],  # pyright: ignore[reportArgumentType]
    )
    info.set_file_format("array_record")
    return info
