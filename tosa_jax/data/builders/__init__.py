"""The project's own TFDS builders, and how sets are prepared and found. No TensorFlow is needed."""

import functools
import io
import re

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tosa_jax.data.builders import digits, idx, image_folder, imagenet, tfrecord
from tosa_jax.data.builders.preparing import (
    GENERATED,
    is_own,
    nearest,
    prepare,
    prepare_own,
    prepared_dir,
)
from tosa_jax.data.decoding import BadImageError, pil_errors
from tosa_jax.errors import ConfigError, DataError
from tosa_jax.paths import is_remote

__all__ = [
    "GENERATED",
    "digits",
    "idx",
    "image_folder",
    "imagenet",
    "is_own",
    "kind_of",
    "nearest",
    "num_examples",
    "open_builder",
    "picture_size",
    "prepare",
    "prepare_own",
    "prepared_dir",
    "tfrecord",
]


# Cached: a run stays with the files that it began with, and they are hashed only once.
@functools.lru_cache(maxsize=16)
def open_builder(name: str, data_dir: str, source_dir: str = "") -> tfds.core.DatasetBuilder:
    """The builder of a prepared set; one of the project's own is prepared first.

    A folder of images is prepared here only up to `image_folder.AUTOMATIC_BYTES`.

    Raises:
      ConfigError, DataError: what `prepare_own`, `prepared_dir` or `kind_of` raises.
    """
    if is_own(name, source_dir) and not is_remote(data_dir):
        limit = image_folder.AUTOMATIC_BYTES
        path = prepare_own(name, data_dir, source_dir, max_bytes=limit)
    else:
        path = prepared_dir(name, data_dir)
    builder = tfds.builder_from_directory(str(path))
    kind_of(builder)
    return builder


def kind_of(builder: tfds.core.DatasetBuilder) -> str:
    """ "classification" or "depth", by what a set has beside its images.

    Raises:
      DataError: the set has no feature "image" (an image), or neither "label" (a class) nor "depth"
        (a map of floating numbers, or 16-bit images).
    """
    features = dict(builder.info.features.items())
    if "image" in features and isinstance(features["image"], tfds.features.Image):
        label, depth = (features.get(key) for key in ("label", "depth"))
        if isinstance(label, tfds.features.ClassLabel):
            return "classification"
        if isinstance(depth, tfds.features.Image) and depth.np_dtype == np.uint16:
            return "depth"
        if isinstance(depth, tfds.features.Tensor) and len(depth.shape) == 2:
            if np.issubdtype(depth.np_dtype, np.floating):
                return "depth"
    raise DataError(
        f"{builder.data_path}: no feature 'image' with a 'label' of kind ClassLabel or a 'depth' map "
        f"beside it (it has {', '.join(sorted(features))}); name a classification or a depth set"
    )


def picture_size(builder: tfds.core.DatasetBuilder, split: str) -> tuple[int, int]:
    """Height and width of a split's images: those of the set, or of the split's first image.

    Raises:
      DataError: the first image is no image.
    """
    size = builder.info.features["image"].shape[:2]
    if None not in size:
        return size
    decoders = {key: tfds.decode.SkipDecoding() for key in ("image", "depth")}
    record = builder.as_data_source(split, decoders=decoders)[0]
    try:
        with pil_errors():
            return Image.open(io.BytesIO(record["image"])).size[::-1]
    except BadImageError as error:
        raise DataError(
            f"{builder.data_path}: the first image of {split} is none: {error}"
        ) from None


def num_examples(builder: tfds.core.DatasetBuilder, split: str, field: str) -> int:
    """How many examples a split, or a TFDS slice or sum of splits ("train[:90%]+test"), has.

    Raises:
      ConfigError: no such split, or it is empty; the text calls the split by `field`, its setting.
    """
    splits = builder.info.splits
    for part in split.split("+"):
        if (base := re.sub(r"\[.*", "", part).strip()) not in splits:
            raise ConfigError(
                f"{field}={split!r}: {builder.info.full_name} has no split {base!r}"
                f"{nearest(base, splits)}"
            )
    try:
        count = splits[split].num_examples
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{field}={split!r} is no TFDS split: {error}") from None
    if not count:
        raise ConfigError(f"{field}={split!r}: holds no examples; take a larger part")
    return count
