"""Anyone's folder of JPEG and PNG files as a TFDS set: the same bytes, in ArrayRecord shards.

Three forms of folder, told apart by what is in it:

    DIR/train/<class>/*.jpg, DIR/val/<class>/*.jpg     val, validation and test are split names too
    DIR/<class>/*.jpg                                  a tenth of each class becomes "validation"
    DIR/*.jpg                                          no classes: all labels 0, class "image"
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from tosa_jax.data.builders.shards import Item, Say, digest, prepared_splits, write_set
from tosa_jax.errors import DataError

# The set's folder under `data_dir`, and the version in it.
NAME = "image_folder"
VERSION = "1.0.0"

# What counts as an image; other files are counted and left out.
EXTENSIONS = (".jpg", ".jpeg", ".png")
AUTOMATIC_BYTES = 2_000_000_000  # more than this is prepared only when it is asked for

SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
"""What people call them -> what TFDS does."""

_VALIDATION_SHARE = 0.1
_ONE_CLASS = "image"
_MAX_DEPTH = 8  # folders in a class folder; a link to a folder above it would never end


@dataclass
class Tree:
    """What a folder holds.

    items        split -> its images; labels are positions in `class_names`
    class_names  the class folders' names, sorted
    skipped      how many other files there are, by extension
    """

    class_names: list[str] = field(default_factory=list)
    items: dict[str, list[Item]] = field(default_factory=dict)
    skipped: Counter = field(default_factory=Counter)

    @property
    def num_bytes(self) -> int:
        """The images' size."""
        return sum(item.size for items in self.items.values() for item in items)


def prepare_image_folder(
    data_dir: Path,
    source_dir: Path,
    *,
    max_bytes: int | None = None,
    overwrite: bool = False,
    say: Say = print,
) -> Path:
    """Prepares a folder of images, unless it is prepared already as it is now.

    Args:
      max_bytes: Prepare no larger folder than this.
    Returns:
      The version folder, data_dir/image_folder/<folder's name>-<fingerprint>/1.0.0. The
      fingerprint changes with the files' relative names, sizes and times.
    Raises:
      DataError: what `scan` raises; the folder is larger than `max_bytes`; the disk is too small.
      OSError: `data_dir` cannot be written.
    """
    tree = scan(source_dir)
    for extension, count in tree.skipped.most_common():
        if count:
            say(f"skipped: {count} files {extension}")
    items = [item for split in sorted(tree.items) for item in tree.items[split]]
    stem = re.sub(r"\W+", "_", source_dir.resolve().name) or "images"
    path = data_dir / NAME / f"{stem}-{digest(items)}" / VERSION
    # The splits are written one after the other.
    if not overwrite and not tree.items.keys() - prepared_splits(path).keys():
        return path
    if max_bytes is not None and tree.num_bytes > max_bytes:
        raise DataError(
            f"{source_dir}: {tree.num_bytes / 1e9:.1f} GB of images are not prepared on the way: "
            f"run `python -m tosa_jax.prepare --config=...` with the same options first"
        )
    write_set(path, _info(path, tree.class_names), tree.items, say, overwrite=overwrite)
    return path


def scan(source_dir: Path) -> Tree:
    """Finds the images of a folder, their splits and classes. No file is opened.

    Raises:
      DataError: no such folder; no image; a class without images; the splits have different
        classes, or one split has two folders; folders are nested too deeply.
    """
    folders, _ = _entries(source_dir)
    named = [f for f in folders if f.lower() in SPLITS]
    has_splits = len(named) > 1 or any(_entries(source_dir / f)[0] for f in named)
    tree = Tree()
    if not has_splits:
        found = _classes(source_dir, source_dir, tree.skipped)
        tree.class_names = sorted(found)
        for label, name in enumerate(tree.class_names):
            _divide(tree, [item._replace(label=label) for item in found[name]])
    else:
        for folder in sorted(set(folders) - set(named)):
            count = sum(1 for _ in _walk(source_dir / folder))
            tree.skipped[f"in {folder}/, which is no split"] += count
        _named_splits(tree, source_dir, named)
    if not tree.items:
        raise DataError(f"{source_dir}: no {', '.join(EXTENSIONS)} files; check source_dir")
    for name in tree.class_names:
        # TFDS keeps the names as lines of a text file.
        if name != name.strip() or "\n" in name:
            raise DataError(f"{source_dir}: class folder {name!r} has white space at its ends")
    return tree


def _named_splits(tree: Tree, source_dir: Path, named: list[str]) -> None:
    for folder in sorted(named):
        split = SPLITS[folder.lower()]
        if split in tree.items:
            raise DataError(f"{source_dir}: two folders for the split {split}; rename one of them")
        found = _classes(source_dir / folder, source_dir, tree.skipped)
        names = sorted(found)
        if tree.items and names != tree.class_names:
            differing = sorted(set(names) ^ set(tree.class_names))
            raise DataError(
                f"{source_dir}: the splits have different classes: {len(differing)} are not in "
                f"all of {', '.join(sorted(named))}, for example {differing[0]!r}"
            )
        tree.class_names = names
        tree.items[split] = [
            item._replace(label=label) for label, name in enumerate(names) for item in found[name]
        ]


def _classes(folder: Path, root: Path, skipped: Counter) -> dict[str, list[Item]]:
    """Class -> images, of a folder of class folders, or of images without classes."""
    classes, files = _entries(folder)
    if not classes:
        images = _images(folder, root, skipped)
        if not images:
            raise DataError(f"{folder}: no {', '.join(EXTENSIONS)} files; check source_dir")
        return {_ONE_CLASS: images}
    loose = sum(Path(file.name).suffix.lower() in EXTENSIONS for file in files)
    skipped["beside the class folders"] += loose
    found = {name: _images(folder / name, root, skipped) for name in classes}
    for name, images in found.items():
        if not images:
            raise DataError(
                f"{folder / name}: a class without {', '.join(EXTENSIONS)} files; remove the "
                f"folder or fill it"
            )
    return found


def _images(folder: Path, root: Path, skipped: Counter) -> list[Item]:
    items = []
    for entry in _walk(folder):
        extension = os.path.splitext(entry.name)[1].lower()
        if extension not in EXTENSIONS:
            skipped[extension or "without an extension"] += 1
            continue
        # Names that are no UTF-8 exist on disks, but not in TFDS.
        name = Path(os.path.relpath(entry.path, root)).as_posix()
        name = os.fsencode(name).decode("utf-8", "replace")
        stat = entry.stat()
        items.append(Item(name, 0, entry.path, 0, stat.st_size, stat.st_mtime_ns))
    return sorted(items)


def _walk(folder: Path, depth: int = 0) -> Iterator[os.DirEntry]:
    """All files below a folder, links followed, hidden ones left out."""
    if depth > _MAX_DEPTH:
        raise DataError(f"{folder}: more than {_MAX_DEPTH} folders deep; is a link going round?")
    folders, files = _entries(folder)
    yield from files
    for name in folders:
        yield from _walk(folder / name, depth + 1)


def _entries(folder: Path) -> tuple[list[str], list[os.DirEntry]]:
    """The names of the folders in a folder, and its files; hidden ones left out."""
    try:
        with os.scandir(folder) as scanned:
            entries = [entry for entry in scanned if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check source_dir") from None
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    return folders, [entry for entry in entries if entry.is_file()]


def _divide(tree: Tree, items: list[Item]) -> None:
    for split, part in hold_out(items).items():
        tree.items.setdefault(split, []).extend(part)


def hold_out(items: list[Item]) -> dict[str, list[Item]]:
    """A tenth to "validation", by the hash of the name, at least one; one at least stays in "train"."""
    hasher = hashing.Hasher("split")
    shuffled = sorted(items, key=lambda item: hasher.hash_key(item.name))
    count = round(len(items) * _VALIDATION_SHARE)
    if len(items) > 1:
        count = max(count, 1)
    parts = {"validation": shuffled[:count], "train": shuffled[count:]}
    return {split: part for split, part in parts.items() if part}


def _info(path: Path, class_names: list[str]) -> tfds.core.DatasetInfo:
    identity = DatasetIdentity(
        name=NAME,
        version=tfds.core.Version(VERSION),
        data_dir=str(path),
        module_name=__name__,
        config_name=path.parent.name,
        release_notes={VERSION: "First version."},
    )
    features = {
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(names=class_names),
        "file_name": tfds.features.Text(),
    }
    info = tfds.core.DatasetInfo(
        builder=identity,
        description="A folder of images.",
        features=tfds.features.FeaturesDict(features),
        supervised_keys=("image", "label"),
    )
    info.set_file_format("array_record")
    return info
