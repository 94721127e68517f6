"""The project's own TFDS builders, and how sets are prepared and found. No TensorFlow is needed."""

import functools
import re

import tensorflow_datasets as tfds

from tosa_jax.data.builders import digits, idx, image_folder, imagenet, tfrecord
from tosa_jax.data.builders.preparing import (
    GENERATED,
    is_own,
    nearest,
    prepare,
    prepare_own,
    prepared_dir,
)
from tosa_jax.errors import ConfigError, DataError
from tosa_jax.files import is_remote

__all__ = [
    "GENERATED",
    "digits",
    "idx",
    "image_folder",
    "imagenet",
    "is_own",
    "nearest",
    "num_examples",
    "open_builder",
    "prepare",
    "prepare_own",
    "prepared_dir",
    "tfrecord",
]


# Cached: a run stays with the files that it began with, and they are hashed only once.
@functools.lru_cache(maxsize=16)
def open_builder(name: str, data_dir: str, source_dir: str = "") -> tfds.core.DatasetBuilder:
    """The builder of a prepared classification set; one of the project's own is prepared first.

    A folder of images is prepared here only up to `image_folder.AUTOMATIC_BYTES`.

    Raises:
      ConfigError, DataError: what `prepare_own` or `prepared_dir` raises; the set has no feature
        "image" (an image) or "label" (a class).
    """
    if is_own(name, source_dir) and not is_remote(data_dir):
        limit = image_folder.AUTOMATIC_BYTES
        path = prepare_own(name, data_dir, source_dir, max_bytes=limit)
    else:
        path = prepared_dir(name, data_dir)
    builder = tfds.builder_from_directory(str(path))
    features = builder.info.features
    for key, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
        if key not in features or not isinstance(features[key], kind):
            raise DataError(
                f"{path}: no feature {key!r} of kind {kind.__name__} (it has "
                f"{', '.join(sorted(features))}); name a classification set"
            )
    return builder


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
