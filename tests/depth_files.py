"""Files of depth sets for tests: NYU Depth V2's HDF5 files with rendered rooms in them, and folders of PNG pairs."""

from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from tosa_jax.data.synthetic.rooms import render_room


def write_nyu_files(folder: Path, *, train: int = 4, validation: int = 2) -> Path:
    """What nyudepthv2.tar.gz unpacks to, at 480x640: the place of `source_dir`."""
    names = [f"train/room_{i % 2}/{i // 2:05d}.h5" for i in range(train)]
    names += [f"val/official/{i:05d}.h5" for i in range(validation)]
    for seed, name in enumerate(names):
        image, depth = render_room((9, seed), 480, 640)
        path = folder / "nyudepthv2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["rgb"] = image.transpose(2, 0, 1)
            file["depth"] = depth.astype(np.float32)
    return folder


def write_pair(folder: Path, name: str, *, size=(24, 32), seed: int = 0, depth=None) -> None:
    """folder/rgb/NAME.png and folder/depth/NAME.png, the latter 16-bit with 1000 units in a metre."""
    image, metres = render_room((8, seed), *size)
    depth = np.rint(1000 * metres).astype(np.uint16) if depth is None else depth
    for kind, array in (("rgb", image), ("depth", depth)):
        path = folder / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
