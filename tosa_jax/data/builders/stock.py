"""What the builders of TFDS's own sets share: they write what TFDS would, but from raw files and without TensorFlow."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from tosa_jax.data.builders.prepared import prepares_alone
from tosa_jax.data.builders.shards import Encode, Item, Say, labelled, prepared_splits, write_set
from tosa_jax.errors import DataError


def stock_info(name: str, data_dir: Path) -> tuple[tfds.core.DatasetInfo, Path]:
    """TFDS's description of a set of its own, and the version folder under `data_dir`.

    Raises:
      DataError: the folder has the set as TFRecord files, which TFDS wrote.
    """
    builder_class: Any = tfds.builder_cls(name)
    info = builder_class(data_dir=str(data_dir), file_format="array_record").info
    path = data_dir / name / str(info.version)
    if any(path.glob("*.tfrecord-*")):
        raise DataError(
            f"{path}: holds a TFRecord copy already; leave source_dir empty to convert that"
        )
    return info, path


def prepare_stock(
    info: tfds.core.DatasetInfo,
    path: Path,
    splits: Iterable[str],
    find: Callable[[str], list[Item]],
    *,
    nothing: str,
    encode: Encode = labelled,
    growth: float = 1.0,
    overwrite: bool,
    say: Say,
) -> Path:
    """Writes the splits that are not prepared yet. All are listed before the first is written.

    Args:
      info: Of `stock_info`, and `path` too.
      find: Lists the examples of a split; an empty list leaves the split out.
      nothing: The error if no split is found or prepared.
      encode: As in `write_set`, and `growth` too.
    Returns:
      `path`.
    Raises:
      DataError: `nothing`, or what `find` or `write_set` raises.
      OSError: the folder cannot be written.
    """
    done = {} if overwrite else prepared_splits(path)
    items: dict[str, list[Item]] = {}
    for split in splits:
        if split in done:
            say(f"{split}: complete already, {done[split].num_examples} examples")
        elif found := find(split):
            items[split] = found
    if not items and not done:
        raise DataError(nothing)
    with prepares_alone(path.parent, say):
        write_set(path, info, items, say, encode=encode, growth=growth, overwrite=overwrite)
    return path
