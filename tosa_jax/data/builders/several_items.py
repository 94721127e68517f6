"""Canvases with several items and a label for each, as TFDS builders; `data.synthetic.several` draws them.

The items are scikit-learn's digits, or Fashion-MNIST's.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tosa_jax.data.builders.digits import load_digits_split
from tosa_jax.data.builders.generated import GeneratedSet, small_png
from tosa_jax.data.builders.idx import fingerprint, idx_config, read_split
from tosa_jax.data.synthetic.several import cells_of, draw_several
from tosa_jax.errors import ConfigError, DataError

DIGITS, FASHION = "several_digits", "several_fashion_mnist"
"""The parts of `DataConfig.name` before the slash."""

_NAME = re.compile(r"(\d+)-(\d+)-(\d+)-(\d+)")
_SEEDS = {"train": 0, "test": 1}
_CLASSES = 10
_SMALLEST_CELL = 8  # pixels: what a digit has
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(kw_only=True)
class SeveralItemsConfig(tfds.core.BuilderConfig):
    """Side of a canvas in pixels, most items on one, canvases in each split, and the names of the classes.

    source_dir  the IDX files of the items; "": digits.
    """

    side: int
    most: int
    train: int
    test: int
    class_names: tuple[str, ...]
    source_dir: str = ""


def digits_config(name: str) -> SeveralItemsConfig:
    """Reads "several_digits/SIDE-MOST-TRAIN-TEST".

    Raises ConfigError: `name` has another form, a number is 0, there are more items than classes, or their cells would
    be smaller than 8 pixels.
    """
    return _config(name, name.partition("/")[2], "the digits", _WORDS)


def fashion_name(name: str, source_dir: str | Path) -> str:
    """The part of `name` after "/" with the fingerprint of the files. Raises ConfigError as `digits_config`; DataError:
    a file is missing or cannot be read."""
    return "-".join([*map(str, _numbers(name)), fingerprint(source_dir)])


def fashion_config(name: str, source_dir: str | Path) -> SeveralItemsConfig:
    """Describes a set of Fashion-MNIST's items after reading and checking all four files.

    Raises ConfigError as `digits_config`, DataError as `idx_config`, or where a split lacks some class.
    """
    full = fashion_name(name, source_dir)
    source = idx_config("fashion_mnist", source_dir)
    most = _numbers(name)[1]
    for split in _SEEDS:
        if (there := len(np.unique(read_split(source_dir, split)[1]))) < most:
            raise DataError(
                f"{source_dir}: {split} has {there} classes, but {name} puts up to {most} on a canvas; set source_dir "
                "to the folder of Fashion-MNIST's four IDX files"
            )
    return _config(name, full, "Fashion-MNIST", source.class_names, source.source_dir)


def _config(
    name: str, folder: str, items: str, class_names: tuple[str, ...], source_dir: str = ""
) -> SeveralItemsConfig:
    side, most, train, test = _numbers(name)
    return SeveralItemsConfig(
        name=folder,
        description=f"1 to {most} items of {items} on canvases of {side}x{side} pixels.",
        side=side,
        most=most,
        train=train,
        test=test,
        class_names=class_names,
        source_dir=source_dir,
    )


def _numbers(name: str) -> tuple[int, int, int, int]:
    base, _, config = name.partition("/")
    match = _NAME.fullmatch(config)
    side, most, train, test = map(int, match.groups()) if match else (0, 0, 0, 0)
    fits = 1 <= most <= _CLASSES and cells_of(side, most)[1] >= _SMALLEST_CELL
    if not (fits and train and test):
        raise ConfigError(
            f"config.data.name={name!r}: write {base}/SIDE-MOST-TRAIN-TEST, the canvases' side in pixels, most items "
            f"on one (1 to {_CLASSES}, each in a cell of at least {_SMALLEST_CELL} pixels), and the canvases in each "
            f"split, for example {base}/56-4-12000-2000"
        )
    return side, most, train, test


class SeveralDigits(GeneratedSet):
    """TFDS set "several_digits": image uint8 [side, side, 1], labels (a list of classes); splits train, test.

    Canvas i of a split depends on i and on the split's own items alone; its labels are in ascending order.
    """

    SPLITS = tuple(_SEEDS)

    def describe(self) -> tuple[str, dict[str, Any]]:
        config: SeveralItemsConfig = self.settings
        label = tfds.features.ClassLabel(names=list(config.class_names))
        return config.description or "", {
            "image": tfds.features.Image(
                shape=(config.side, config.side, 1), encoding_format="png"
            ),
            "labels": tfds.features.Sequence(label),
        }

    def items(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [n, s, s] and classes [n] of the items of a split."""
        return load_digits_split(split)

    def examples(self, split: str) -> Iterator[dict[str, Any]]:
        config: SeveralItemsConfig = self.settings
        images, classes = self.items(split)
        groups = [images[classes == i] for i in range(len(config.class_names))]
        for i in range(getattr(config, split)):
            canvas = draw_several((_SEEDS[split], i), groups, config.side, config.most)
            yield {"image": small_png(canvas.image), "labels": canvas.labels.tolist()}


class SeveralFashionMnist(SeveralDigits):
    """TFDS set "several_fashion_mnist": the same with Fashion-MNIST's items."""

    def items(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        return read_split(self.settings.source_dir, split)
