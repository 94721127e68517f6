"""What the builders of a person's own folders share: names of splits, and how listed files become a prepared set."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from tosa_jax.data.builders.prepared import open_prepared, prepares_alone
from tosa_jax.data.builders.shards import (
    Encode,
    Item,
    Say,
    digest,
    num_bytes,
    prepared_splits,
    read_files,
    write_set,
)
from tosa_jax.errors import DataError
from tosa_jax.paths import parse_json, write_atomically

VERSION = "1.0.0"
"""Of the sets of all folders."""

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif")
"""Files with these names, in lower or upper case, are images."""

ALIASES = "same_folders.json"
"""Beside the version of a set: digests of other folders with the same files."""

AUTOMATIC_BYTES = 2_000_000_000
"""A larger folder is prepared by the command alone, not on the way to training."""

SPLITS = {"train": "train", "test": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
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
    notes        what is said before it is written, a line each: files that are left out.
    """

    name: str
    description: str
    features: Mapping[str, Any]
    items: Mapping[str, list[Item]]
    encode: Encode
    notes: tuple[str, ...] = ()


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
      depends on the relative names, sizes and modification times of the files. If only the times
      or the folder's name differ from those of a set that is there, it is that set (`find_same`).
    Raises:
      DataError: the folder is larger than `max_bytes`, the disk is too small, or what `check_items` raises.
      OSError: `data_dir` cannot be written.
    """
    items = [item for split in sorted(found.items) for item in found.items[split]]
    stem = re.sub(r"\W+", "_", source_dir.resolve().name) or "images"
    key = digest(items)
    path = data_dir / found.name / f"{stem}-{key}" / VERSION
    if not overwrite and (done := _prepared_already(found, path, key)):
        return done
    with prepares_alone(data_dir / found.name, say):
        if not overwrite and (done := _prepared_already(found, path, key)):
            return done  # by the process that was waited for
        if not overwrite and (same := find_same(found, path.parents[1])):
            say(f"{source_dir}: the files are those of {same.parent.name}, which is used")
            _write_aliases(same, {*_aliases(same), key})
            return same
        return _write(found, path, source_dir, items, max_bytes, overwrite, say, check_items)


def _write(
    found: FolderSet,
    path: Path,
    source_dir: Path,
    items: list[Item],
    max_bytes: int | None,
    overwrite: bool,
    say: Say,
    check_items: Callable[[list[Item]], None],
) -> Path:
    size = num_bytes(items)
    if max_bytes is not None and size > max_bytes:
        raise DataError(
            f"{source_dir}: {size / 1e9:.1f} GB of images are not prepared on the way: run "
            "`python -m tosa_jax.prepare --config=...` with the same options first"
        )
    for note in found.notes:
        say(note)
    check_items(items)
    info = _info(found, path)
    write_set(path, info, found.items, say, encode=found.encode, overwrite=overwrite)
    return path


def _prepared_already(found: FolderSet, path: Path, key: str) -> Path | None:
    """The version folder with all splits of a set, under its own name or another's; None: there is none."""
    wanted = found.items.keys()  # a stopped call may have left only some of the splits
    if not wanted - prepared_splits(path).keys():
        return path
    for other in path.parents[1].glob(f"*/{VERSION}"):
        if key in _aliases(other) and not wanted - prepared_splits(other).keys():
            return other
    return None


def _aliases(path: Path) -> list[str]:
    """The digests of folders whose files were found to be those of this set."""
    try:
        keys = parse_json((path.parent / ALIASES).read_bytes())
    except (OSError, ValueError):
        return []
    return keys if isinstance(keys, list) else []


def _write_aliases(path: Path, keys: set[str]) -> None:
    write_atomically(path.parent / ALIASES, json.dumps(sorted(keys)).encode())


def find_same(found: FolderSet, folder: Path) -> Path | None:
    """A prepared set below `folder` that has the same files, byte for byte; None: there is none.

    So a folder that was copied or touched is not stored again. All files are read for this, but only where their names,
    number and sizes in all are already those of a set.
    """
    for path in sorted(folder.glob(f"*/{VERSION}")):
        try:
            if _is_same(found, path):
                return path
        except DataError:
            continue  # a damaged set is like none
    return None


def _is_same(found: FolderSet, path: Path) -> bool:
    done = prepared_splits(path)
    for split, items in found.items.items():
        if split not in done or done[split].num_examples != len(items):
            return False
        if done[split].num_bytes != num_bytes(items):
            return False
    builder = open_prepared(path)
    features: Any = builder.info.features
    if any(str(features[name]) != str(found.features[name]) for name in found.features):
        return False
    if "label" in found.features and features["label"].names != found.features["label"].names:
        return False
    encoded = [name for name, x in found.features.items() if isinstance(x, tfds.features.Image)]
    for split, items in found.items.items():
        by_name = {item.name: item for item in items}
        open_split: Any = builder.as_data_source  # Any: pyright misreads TFDS's decorator
        records = open_split(split, decoders=dict.fromkeys(encoded, tfds.decode.SkipDecoding()))
        for record in records:
            item = by_name.get(record["file_name"].decode("utf-8", "replace"))
            if item is None or record.get("label", item.label) != item.label:
                return False
            example = found.encode(item, read_files(item))
            if any(example[name] != record[name] for name in encoded):
                return False
    return True


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
