"""A folder of image files as a TFDS set: the same bytes, in ArrayRecord shards.

The folder has one of three layouts, which its content tells:

    DIR/train/<class>/*.jpg, DIR/val/<class>/*.jpg     val, valid, validation or dev, and test are splits; a tenth of
                                                       each class of a lone train becomes "validation"
    DIR/<class>/*.jpg                                  a tenth of each class becomes "validation"
    DIR/*.jpg                                          no classes: all labels are 0, class "image"
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tensorflow_datasets as tfds

from tosa_jax.data.builders.folders import (
    EXTENSIONS,
    SPLITS,
    FolderSet,
    file_item,
    hold_out,
    prepare_folder,
)
from tosa_jax.data.builders.shards import Item, Say, labelled
from tosa_jax.errors import DataError

NAME = "image_folder"  # in `DataConfig.name`
_ONE_CLASS = "image"
_DANGLING = "that are links to nothing"
_MAX_DEPTH = 8  # folders within a class folder; a link to a folder above would never end


@dataclass
class Tree:
    """What a folder holds.

    class_names  names of the class folders, sorted.
    items        split -> its images; a label is a position in `class_names`.
    skipped      number of files that are left out, by extension or place.
    """

    class_names: list[str] = field(default_factory=list)
    items: dict[str, list[Item]] = field(default_factory=dict)
    skipped: Counter = field(default_factory=Counter)


def prepare_image_folder(
    data_dir: Path,
    source_dir: Path,
    *,
    max_bytes: int | None = None,
    overwrite: bool = False,
    say: Say = print,
) -> Path:
    """Prepares a folder of images, unless it is prepared already as it is now.

    Arguments and result are those of `folders.prepare_folder`.

    Raises:
      DataError: as `scan` and `folders.prepare_folder`.
      OSError: `data_dir` cannot be written.
    """
    tree = scan(source_dir)
    features = {
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(names=tree.class_names),
        "file_name": tfds.features.Text(),
    }
    notes = (f"skipped: {n} files {what}" for what, n in tree.skipped.most_common() if n)
    found = FolderSet(NAME, "A folder of images.", features, tree.items, labelled, tuple(notes))
    return prepare_folder(
        found, data_dir, source_dir, max_bytes=max_bytes, overwrite=overwrite, say=say
    )


def scan(source_dir: Path) -> Tree:
    """Lists the images of a folder with their splits and classes. No file is opened.

    Raises:
      DataError: the folder does not exist, has no images, or has a class without images; its splits
        have different classes, or two folders are the same split; folders are nested too deeply.
    """
    folders, _, links = _entries(source_dir)
    named = [f for f in folders if f.lower() in SPLITS]
    has_splits = len(named) > 1 or any(_entries(source_dir / f)[0] for f in named)
    tree = Tree()
    if not has_splits:
        _add_split(tree, "train", _classes(source_dir, source_dir, tree.skipped))
    else:
        tree.skipped[_DANGLING] += links
        for folder in sorted(set(folders) - set(named)):
            count = sum(1 for _ in _walk(source_dir / folder, tree.skipped))
            tree.skipped[f"in {folder}/, which is no split"] += count
        _named_splits(tree, source_dir, named)
    if tree.items.keys() == {"train"}:
        _hold_out_of_train(tree)
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
        _add_split(tree, split, found)


def _add_split(tree: Tree, split: str, found: dict[str, list[Item]]) -> None:
    """Takes the images of a split, by class; their labels are the classes' places in the order of the names."""
    tree.class_names = sorted(found)
    tree.items[split] = [
        item._replace(label=label)
        for label, name in enumerate(tree.class_names)
        for item in found[name]
    ]


def _hold_out_of_train(tree: Tree) -> None:
    """Makes a validation split of a tenth of each class, where "train" is the only split."""
    items, tree.items = tree.items["train"], {}
    for label in range(len(tree.class_names)):
        parts = hold_out([item for item in items if item.label == label])
        for split, part in parts.items():
            tree.items.setdefault(split, []).extend(part)


def _classes(folder: Path, root: Path, skipped: Counter) -> dict[str, list[Item]]:
    """Class -> its images, for a folder of class folders; a folder of images alone is one class."""
    classes, files, links = _entries(folder)
    if not classes:
        images = _images(folder, root, skipped)
        if not images:
            raise DataError(f"{folder}: no {', '.join(EXTENSIONS)} files; check source_dir")
        return {_ONE_CLASS: images}
    skipped[_DANGLING] += links
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
    for entry in _walk(folder, skipped):
        extension = os.path.splitext(entry.name)[1].lower()
        if extension not in EXTENSIONS:
            skipped[extension or "without an extension"] += 1
            continue
        item = file_item(Path(entry.path), root)
        # Disks may hold names that are no UTF-8; TFDS may not.
        items.append(item._replace(name=os.fsencode(item.name).decode("utf-8", "replace")))
    return sorted(items)


def _walk(folder: Path, skipped: Counter, depth: int = 0) -> Iterator[os.DirEntry]:
    """All files in a folder and its folders. Links are followed, those to nothing counted, hidden names left out."""
    if depth > _MAX_DEPTH:
        raise DataError(f"{folder}: more than {_MAX_DEPTH} folders deep; is a link going round?")
    folders, files, links = _entries(folder)
    skipped[_DANGLING] += links
    yield from files
    for name in folders:
        yield from _walk(folder / name, skipped, depth + 1)


def _entries(folder: Path) -> tuple[list[str], list[os.DirEntry], int]:
    """What is directly in a folder: names of folders, sorted; files; the number of links to nothing.

    Hidden names are left out.
    """
    try:
        with os.scandir(folder) as scanned:
            entries = [entry for entry in scanned if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check source_dir") from None
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    links = sum(entry.is_symlink() and not os.path.exists(entry) for entry in entries)
    return folders, [entry for entry in entries if entry.is_file()], links
