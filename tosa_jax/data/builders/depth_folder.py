"""A folder of images and 16-bit PNG depth maps as a TFDS set: the same bytes, in ArrayRecord shards.

The folder has one of three layouts, which its content tells:

    DIR/train/rgb/a.jpg, DIR/train/depth/a.png, DIR/val/...   val, validation and test are splits too
    DIR/rgb/a.jpg, DIR/depth/a.png                            a tenth becomes "validation"
    DIR/train.txt, DIR/val.txt                                the lists of BTS and NeWCRFs: each line names an image and
                                                              its depth map, relative to DIR; the rest is ignored
"""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tosa_jax.data.builders.folders import (
    EXTENSIONS,
    SPLITS,
    FolderSet,
    file_item,
    hold_out,
    prepare_folder,
)
from tosa_jax.data.builders.shards import Item, Progress, Say
from tosa_jax.data.decoding import FORMATS, BadImageError, pil_errors
from tosa_jax.data.depth.maps import check_depth_png
from tosa_jax.errors import DataError

NAME = "depth_folder"  # in `DataConfig.name`

Pair = tuple[Path, Path]
"""The files of an image and of its depth map."""


def prepare_depth_folder(
    data_dir: Path,
    source_dir: Path,
    *,
    max_bytes: int | None = None,
    overwrite: bool = False,
    say: Say = print,
) -> Path:
    """Prepares a folder of images with depth maps, unless it is prepared already as it is now.

    Arguments and result are those of `folders.prepare_folder`.

    Raises:
      DataError: as `scan`, `check_pairs` and `folders.prepare_folder`.
      OSError: `data_dir` cannot be written.
    """
    features = {
        "image": tfds.features.Image(),
        "depth": tfds.features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png"),
        "file_name": tfds.features.Text(),
    }
    items = scan(source_dir)
    found = FolderSet(NAME, "A folder of pictures and depth maps.", features, items, _example)
    return prepare_folder(
        found,
        data_dir,
        source_dir,
        max_bytes=max_bytes,
        overwrite=overwrite,
        say=say,
        check_items=lambda items: check_pairs(items, say),
    )


def scan(source_dir: Path) -> dict[str, list[Item]]:
    """Split -> its images; the `beside` of each is its depth map. No image is opened.

    Raises:
      DataError: the folder does not exist or has another layout; an image has no depth map, or the reverse; a split
        is empty or given twice; a line of a list does not name two files.
    """
    lists = {path.stem: path for path in source_dir.glob("*.txt") if path.stem in SPLITS}
    folders = {name: source_dir / name for name in SPLITS if (source_dir / name / "rgb").is_dir()}
    given = lists or folders
    split_names = [SPLITS[name] for name in given]
    for split in split_names:
        if split_names.count(split) > 1:
            raise DataError(f"{source_dir}: two sources of the split {split}; remove one of them")
    if not given:
        if not (source_dir / "rgb").is_dir():
            raise DataError(
                f"{source_dir}: neither rgb/ and depth/, nor train/rgb/ and train/depth/, nor train.txt; "
                "check source_dir"
            )
        return hold_out(_items(_folder_pairs(source_dir), source_dir))
    read = _listed_pairs if lists else _folder_pairs
    return {SPLITS[name]: _items(read(path), source_dir) for name, path in given.items()}


def check_pairs(items: list[Item], say: Say) -> None:
    """Checks the headers of all files.

    Raises:
      DataError: a file is no image, or a depth map is no 16-bit grey PNG or has another size than its image.
    """
    progress = Progress(say, "checking")
    for i, item in enumerate(items, 1):
        depth_item = item.beside
        assert depth_item is not None, "`scan` pairs every image"
        with _opened(item) as image, _opened(depth_item) as depth:
            size, depth_size = image.size, depth.size
            try:
                check_depth_png(depth)
            except BadImageError as error:
                raise DataError(f"{depth_item.path}: {error}") from None
        if size != depth_size:
            raise DataError(
                f"{depth_item.path}: {depth_size[1]}x{depth_size[0]} pixels, but its picture "
                f"{item.name} has {size[1]}x{size[0]}; bring both to one size"
            )
        progress(f"{i} of {len(items)} pairs")


def _opened(item: Item) -> Image.Image:
    """Opens an image and reads its header; PIL reads the pixels when they are asked for."""
    try:
        with pil_errors():
            return Image.open(item.path, formats=FORMATS)
    except BadImageError as error:
        raise DataError(f"{item.path}: {error}") from None


def _folder_pairs(folder: Path) -> list[Pair]:
    """The pairs of folder/rgb and folder/depth: files with the same relative path but for the extension."""
    rgb, depth = (
        {
            path.relative_to(folder / kind).with_suffix(""): path
            for path in sorted((folder / kind).rglob("*"))
            if path.suffix.lower() in extensions and not path.name.startswith(".")
        }
        for kind, extensions in (("rgb", EXTENSIONS), ("depth", (".png",)))
    )
    if not rgb:
        raise DataError(f"{folder / 'rgb'}: no {', '.join(EXTENSIONS)} files; check source_dir")
    if alone := sorted(rgb.keys() ^ depth.keys()):
        name = alone[0]
        has, lacks = (rgb, "depth map") if name in rgb else (depth, "picture")
        raise DataError(
            f"{has[name]}: no {lacks} {name} belongs to it ({len(alone)} files of {folder} are alone); "
            "add it or remove the file"
        )
    return [(rgb[name], depth[name]) for name in sorted(rgb)]


def _listed_pairs(path: Path) -> list[Pair]:
    """The pairs that a list names, one a line, relative to the folder of the list."""
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        # Names in BTS's lists begin with a slash, though they are relative.
        files = [path.parent / name.lstrip("/") for name in line.split()[:2]]
        missing = [str(file) for file in files if not file.is_file()]
        if len(files) < 2 or missing:
            raise DataError(
                f"{path}, line {number}: {f'no such file {missing[0]}' if missing else 'one name'}; a line names a "
                "picture and its depth map, relative to the list"
            )
        pairs.append((files[0], files[1]))
    if not pairs:
        raise DataError(f"{path}: no line; write a picture and its depth map in each")
    return pairs


def _items(pairs: list[Pair], root: Path) -> list[Item]:
    return sorted(
        file_item(rgb, root)._replace(beside=file_item(depth, root)) for rgb, depth in pairs
    )


def _example(item: Item, files: list[bytes]) -> dict:
    return {"image": files[0], "depth": files[1], "file_name": item.name}
