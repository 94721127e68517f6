"""Square crops of pictures of any size: images to compare networks on, without labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tosa_jax.errors import DataError


def random_crops(
    files: Sequence[Path], count: int, size: int, seed: int = 0
) -> tuple[UInt8[np.ndarray, "b h w 3"], list[Path]]:
    """`count` crops of `size` pixels a side, and the picture that each is of, in turn.

    A picture's shorter side is resized to `size` (bicubic); which pictures come first and where crops lie, `seed` says.

    Raises DataError: a file is no image.
    """
    shuffled = list(files)
    rng = np.random.default_rng(seed)
    rng.shuffle(shuffled)  # pyright: ignore[reportArgumentType]
    sources = [shuffled[i % len(shuffled)] for i in range(count)]
    images = []
    for path in sources:
        picture = _resized(path, size)
        wide, high = picture.size
        x, y = (int(rng.integers(0, side - size + 1)) for side in (wide, high))
        images.append(np.asarray(picture.crop((x, y, x + size, y + size))))
    return np.stack(images), sources


def _resized(path: Path, size: int) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture = picture.convert("RGB")
            scale = size / min(picture.size)
            wide, high = (max(size, round(side * scale)) for side in picture.size)
            return picture.resize((wide, high), Image.Resampling.BICUBIC)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error
