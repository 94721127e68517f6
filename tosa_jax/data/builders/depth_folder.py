"""Anyone's folder of pictures and 16-bit PNG depth maps as a TFDS set: the same bytes, in ArrayRecord shards.

Three forms of folder, told apart by what is in it:

    DIR/train/rgb/a.jpg, DIR/train/depth/a.png, DIR/val/...   val, validation and test are split names too
    DIR/rgb/a.jpg, DIR/depth/a.png                            a tenth becomes "validation"
    DIR/train.txt, DIR/val.txt                                the lists of BTS and NeWCRFs: a line has a picture and
                                                              its depth map, relative to DIR, and may go on
"""

import re
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from tosa_jax.data.builders.image_folder import EXTENSIONS, SPLITS, hold_out
from tosa_jax.data.builders.shards import Item, Progress, Say, digest, prepared_splits, write_set
from tosa_jax.data.decoding import BadImageError, pil_errors
from tosa_jax.data.depth_maps import check_depth_png
from tosa_jax.errors import DataError

# The set's folder under `data_dir`, and the version in it.
NAME = "depth_folder"
VERSION = "1.0.0"

Pair = tuple[Path, Path]
"""A picture's file and its depth map's."""


def prepare_depth_folder(
    data_dir: Path,
    source_dir: Path,
    *,
    max_bytes: int | None = None,
    overwrite: bool = False,
    say: Say = print,
) -> Path:
    """Prepares a folder of pictures and depth maps, unless it is prepared already as it is now.

    Args:
      max_bytes: Prepare no larger folder than this.
    Returns:
      The version folder, data_dir/depth_folder/<folder's name>-<fingerprint>/1.0.0. The fingerprint
      changes with the files' relative names, sizes and times.
    Raises:
      DataError: what `scan` or `check_pairs` raises; the folder is larger than `max_bytes`; the disk is too small.
      OSError: `data_dir` cannot be written.
    """
    items = scan(source_dir)
    everything = [item for split in sorted(items) for item in items[split]]
    stem = re.sub(r"\W+", "_", source_dir.resolve().name) or "depth"
    path = data_dir / NAME / f"{stem}-{digest(everything)}" / VERSION
    if not overwrite and not items.keys() - prepared_splits(path).keys():
        return path
    size = sum(item.size + item.beside.size for item in everything)
    if max_bytes is not None and size > max_bytes:
        raise DataError(
            f"{source_dir}: {size / 1e9:.1f} GB of images are not prepared on the way: run "
            "`python -m tosa_jax.prepare --config=...` with the same options first"
        )
    check_pairs(everything, say)
    write_set(path, _info(path), items, say, encode=_example, overwrite=overwrite)
    return path


def scan(source_dir: Path) -> dict[str, list[Item]]:
    """Split -> its pictures, each with its depth map beside it. No image is opened.

    Raises:
      DataError: no such folder, or of neither form; a picture without a depth map or the reverse; a split without
        pairs, or given twice; a list's line without two names.
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
    """Reads the headers of all files.

    Raises:
      DataError: one is no image, a depth map is no 16-bit PNG, or has another size than its picture.
    """
    progress = Progress(say, "checking")
    for i, item in enumerate(items, 1):
        with _opened(item) as image, _opened(item.beside) as depth:
            size, depth_size = image.size, depth.size
            try:
                check_depth_png(depth)
            except BadImageError as error:
                raise DataError(f"{item.beside.path}: {error}") from None
        if size != depth_size:
            raise DataError(
                f"{item.beside.path}: {depth_size[1]}x{depth_size[0]} pixels, but its picture "
                f"{item.name} has {size[1]}x{size[0]}; bring both to one size"
            )
        progress(f"{i} of {len(items)} pairs")


def _opened(item: Item) -> Image.Image:
    """An image of which only the header is read."""
    try:
        with pil_errors():
            return Image.open(item.path)
    except BadImageError as error:
        raise DataError(f"{item.path}: {error}") from None


def _folder_pairs(folder: Path) -> list[Pair]:
    """The pairs of folder/rgb and folder/depth, by their names without the extension."""
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
    """The pairs that the lines of a file name, relative to its folder."""
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        # BTS's names begin with a slash that is not the root's.
        files = [path.parent / name.lstrip("/") for name in line.split()[:2]]
        missing = [str(file) for file in files if not file.is_file()]
        if len(files) < 2 or missing:
            raise DataError(
                f"{path}, line {number}: {f'no such file {missing[0]}' if missing else 'one name'}; a line names a "
                "picture and its depth map, relative to the list"
            )
        pairs.append(tuple(files))
    if not pairs:
        raise DataError(f"{path}: no line; write a picture and its depth map in each")
    return pairs


def _items(pairs: list[Pair], root: Path) -> list[Item]:
    return sorted(_item(rgb, root)._replace(beside=_item(depth, root)) for rgb, depth in pairs)


def _item(path: Path, root: Path) -> Item:
    stat = path.stat()
    name = path.relative_to(root).as_posix()
    return Item(name, 0, str(path), 0, stat.st_size, stat.st_mtime_ns)


def _example(item: Item, files: list[bytes]) -> dict:
    return {"image": files[0], "depth": files[1], "file_name": item.name}


def _info(path: Path) -> tfds.core.DatasetInfo:
    identity = DatasetIdentity(
        name=NAME,
        version=tfds.core.Version(VERSION),
        data_dir=str(path),
        module_name=__name__,
        config_name=path.parent.name,
        release_notes={VERSION: "First version."},
    )
    depth = tfds.features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png")
    features = {"image": tfds.features.Image(), "depth": depth, "file_name": tfds.features.Text()}
    info = tfds.core.DatasetInfo(
        builder=identity,
        description="A folder of pictures and depth maps.",
        features=tfds.features.FeaturesDict(features),
        supervised_keys=("image", "depth"),
    )
    info.set_file_format("array_record")
    return info
