"""NYU Depth V2 from its HDF5 files to TFDS's "nyu_depth_v2", without TensorFlow.

Silberman et al., "Indoor Segmentation and Support Inference from RGBD Images", ECCV 2012, in the version that TFDS
uses (Ma and Karaman 2018, arXiv 1709.07492): 47,584 training images and the 654 official test images of 480x640. Each
is a file with "rgb" uint8 [3, 480, 640] and "depth" float32 [480, 640] in metres. Features, keys and order are TFDS's.
"""

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np

from tosa_jax.data.builders.folders import file_item
from tosa_jax.data.builders.generated import small_png
from tosa_jax.data.builders.shards import Item, Progress, Say
from tosa_jax.data.builders.stock import prepare_stock, stock_info
from tosa_jax.errors import DataError

# TFDS's name of the set, and what the unpacked download holds.
NAME = "nyu_depth_v2"
CONTENT = "nyudepthv2.tar.gz, unpacked (train/SCENE/*.h5, val/official/*.h5)"

_FOLDERS = {"train": "train", "validation": "val"}
_COUNTS = {"train": 47_584, "validation": 654}
_SHAPES = {"rgb": (3, 480, 640), "depth": (480, 640)}
# TFDS's features store each float16 as a float32: a file of 0.65 MB becomes about 1.6 MB.
_GROWTH = 2.5


def prepare_nyu(
    data_dir: Path, source_dir: Path, *, overwrite: bool = False, say: Say = print
) -> Path:
    """Prepares the splits whose folder is in `source_dir` or in its "nyudepthv2"; one is enough.

    A split that is prepared already stays as it is, and shards that a stopped call completed are used.

    Returns:
      The version folder, data_dir/nyu_depth_v2/0.0.1.
    Raises:
      DataError: there is no such folder; a file is broken or has other arrays; h5py is missing; the version folder
        has a TFRecord copy; the disk is too small.
      OSError: `data_dir` cannot be written.
    """
    info, path = stock_info(NAME, data_dir)
    if importlib.util.find_spec("h5py") is None:
        raise DataError(f'{NAME} is prepared with h5py: pip install "tosa-jax[prepare]"')
    nested = source_dir / "nyudepthv2"
    root = nested if nested.is_dir() else source_dir

    def find(split: str) -> list[Item]:
        items = _list(root / _FOLDERS[split], say)
        if not items:
            say(f"{split}: no {_FOLDERS[split]}/*/*.h5 in {root}, left out")
        elif len(items) != _COUNTS[split]:
            say(f"{split}: {len(items)} examples of the {_COUNTS[split]} of the whole set")
        return items

    return prepare_stock(
        info,
        path,
        _FOLDERS,
        find,
        nothing=f"{source_dir}: no .h5 files; set source_dir to the folder of {CONTENT}",
        encode=_example,
        growth=_GROWTH,
        overwrite=overwrite,
        say=say,
    )


def _list(folder: Path, say: Say) -> list[Item]:
    progress = Progress(say, f"listing {folder.name}")
    items = []
    for file in sorted(folder.glob("*/*.h5")):
        # The name is TFDS's key, which decides the order.
        items.append(file_item(file, folder)._replace(name=f"{file.parent.name}_{file.name}"))
        progress(f"{len(items)} files")
    return items


def _example(item: Item, files: list[bytes]) -> dict:
    import h5py

    try:
        with h5py.File(io.BytesIO(files[0]), "r") as file:
            rgb, depth = (_array(file, item, key) for key in _SHAPES)
    except DataError:
        raise
    except Exception as error:  # h5py stumbles over a broken file in any way
        raise DataError(f"{item.path}: no HDF5 file with 'rgb' and 'depth' ({error})") from None
    image = np.ascontiguousarray(rgb.astype(np.uint8).transpose(1, 2, 0))
    return {"image": small_png(image), "depth": depth.astype(np.float16)}


def _array(file: Any, item: Item, key: str) -> np.ndarray:
    """A data set of an HDF5 file as an array. What it is, is checked before any of it is read.

    Raises DataError: another shape or type, or the numbers lie in other files, which a hostile file may name.
    """
    in_file = type(file.get(key, getlink=True)).__name__ == "HardLink"
    data = file[key] if in_file else None
    if key not in file:
        raise KeyError(key)
    if data is None or data.external or data.is_virtual:
        raise DataError(f"{item.path}: {key!r} is not in this file")
    if data.shape != _SHAPES[key] or data.dtype.kind not in "uif":
        raise DataError(
            f"{item.path}: {key!r} is {data.dtype} {data.shape}, not numbers {_SHAPES[key]}"
        )
    return np.asarray(data)
