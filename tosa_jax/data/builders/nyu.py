"""NYU Depth V2 from its HDF5 files to TFDS's "nyu_depth_v2", without TensorFlow.

Silberman et al., "Indoor Segmentation and Support Inference from RGBD Images", ECCV 2012, in the form that TFDS takes
(Ma and Karaman 2018, arXiv 1709.07492): 47,584 training pictures and the 654 official test pictures, 480x640, each a
file with "rgb" uint8 [3, 480, 640] and "depth" float32 [480, 640] in metres. Schema, keys and order are TFDS's.
"""

import importlib.util
import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from tosa_jax.data.builders.digits import png_bytes
from tosa_jax.data.builders.shards import Item, Progress, Say, prepared_splits, write_set
from tosa_jax.errors import DataError

# TFDS's name, and what its download holds.
NAME = "nyu_depth_v2"
CONTENT = "nyudepthv2.tar.gz, unpacked (train/SCENE/*.h5, val/official/*.h5)"

_SPLITS = {"train": "train", "validation": "val"}
_COUNTS = {"train": 47_584, "validation": 654}
_SHAPES = {"rgb": (3, 480, 640), "depth": (480, 640)}
# TFDS's schema writes each float16 as a float32: about 1.6 MB of files of .65 MB.
_GROWTH = 2.5


def prepare_nyu(
    data_dir: Path, source_dir: Path, *, overwrite: bool = False, say: Say = print
) -> Path:
    """Prepares the splits whose folder is in `source_dir` or in its "nyudepthv2"; one is enough.

    A split that is prepared already stays as it is, and shards that an earlier call completed are used.

    Returns:
      The version folder, data_dir/nyu_depth_v2/0.0.1.
    Raises:
      DataError: no such folder; a file is broken or has other contents; h5py is missing; the disk is too small.
      OSError: `data_dir` cannot be written.
    """
    info = tfds.builder_cls(NAME)(data_dir=str(data_dir), file_format="array_record").info
    path = data_dir / NAME / str(info.version)
    if any(path.glob("*.tfrecord-*")):
        raise DataError(
            f"{path}: holds a TFRecord copy already; leave source_dir empty to convert that"
        )
    if importlib.util.find_spec("h5py") is None:
        raise DataError(f'{NAME} is prepared with h5py: pip install "tosa-jax[prepare]"')
    done = () if overwrite else prepared_splits(path)
    nested = source_dir / "nyudepthv2"
    root = nested if nested.is_dir() else source_dir
    items = {}
    for split, folder in _SPLITS.items():
        if split in done:
            say(f"{split}: complete already, {done[split].num_examples} examples")
        elif found := _list(root / folder, say):
            items[split] = found
            if len(found) != _COUNTS[split]:
                say(f"{split}: {len(found)} examples of the {_COUNTS[split]} of the whole set")
        else:
            say(f"{split}: no {folder}/*/*.h5 in {root}, left out")
    if not items and not done:
        raise DataError(f"{source_dir}: no .h5 files; set source_dir to the folder of {CONTENT}")
    write_set(path, info, items, say, encode=_example, growth=_GROWTH, overwrite=overwrite)
    return path


def _list(folder: Path, say: Say) -> list[Item]:
    progress = Progress(say, f"listing {folder.name}")
    items = []
    for file in sorted(folder.glob("*/*.h5")):
        stat = file.stat()
        # TFDS's key, which decides the order.
        name = f"{file.parent.name}_{file.name}"
        items.append(Item(name, 0, str(file), 0, stat.st_size, stat.st_mtime_ns))
        progress(f"{len(items)} files")
    return items


def _example(item: Item, files: list[bytes]) -> dict:
    import h5py

    try:
        with h5py.File(io.BytesIO(files[0]), "r") as file:
            rgb, depth = (np.asarray(file[key]) for key in ("rgb", "depth"))
    except (OSError, KeyError) as error:
        raise DataError(f"{item.path}: no HDF5 file with 'rgb' and 'depth' ({error})") from None
    for key, array in (("rgb", rgb), ("depth", depth)):
        if array.shape != _SHAPES[key]:
            raise DataError(f"{item.path}: {key!r} is {array.shape}, not {_SHAPES[key]}")
    image = np.ascontiguousarray(rgb.astype(np.uint8).transpose(1, 2, 0))
    return {"image": png_bytes(image), "depth": depth.astype(np.float16)}
