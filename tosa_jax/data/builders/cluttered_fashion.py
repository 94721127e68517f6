"""Items of Fashion-MNIST on cluttered canvases, as a TFDS builder; `data.synthetic.clutter` draws them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tosa_jax.data.builders.generated import GeneratedSet, small_png
from tosa_jax.data.builders.idx import fingerprint, idx_config, read_split
from tosa_jax.data.synthetic.clutter import draw_canvas
from tosa_jax.errors import ConfigError, DataError

NAME = "cluttered_fashion_mnist"  # the part of `DataConfig.name` before the slash
_NAME = re.compile(rf"{NAME}/(\d+)-(\d+)-(\d+)")
_ITEM = (28, 28)
_SEEDS = {"train": 0, "test": 1}


@dataclass(kw_only=True)
class ClutteredFashionMnistConfig(tfds.core.BuilderConfig):
    """Side of a canvas in pixels, number of canvases in each split, and the IDX files of the items."""

    side: int
    train: int
    test: int
    source_dir: str
    class_names: tuple[str, ...]


def config_name(name: str, source_dir: str | Path) -> str:
    """The part of `name` after "/" with the fingerprint of the files: "56-20000-4000-1a2b3c4d".

    Raises:
      ConfigError: `name` is not "cluttered_fashion_mnist/SIDE-TRAIN-TEST", the side is below 28, or a number is 0.
      DataError: a file is missing or cannot be read.
    """
    return "-".join([*map(str, _numbers(name)), fingerprint(source_dir)])


def cluttered_config(name: str, source_dir: str | Path) -> ClutteredFashionMnistConfig:
    """Describes a set after reading and checking all four files: a broken one is found before anything is written.

    Raises:
      ConfigError: as `config_name`.
      DataError: as `idx_config`; or the items are not 28x28.
    """
    side, train, test = _numbers(name)
    source = idx_config("fashion_mnist", source_dir)
    if source.image_shape != _ITEM:
        raise DataError(
            f"{source_dir}: images are {source.image_shape}, but Fashion-MNIST's are {_ITEM}; set source_dir to the "
            "folder of Fashion-MNIST's four IDX files"
        )
    return ClutteredFashionMnistConfig(
        name=config_name(name, source_dir),
        description=f"Fashion-MNIST's items on cluttered canvases of {side}x{side} pixels.",
        side=side,
        train=train,
        test=test,
        source_dir=source.source_dir,
        class_names=source.class_names,
    )


def _numbers(name: str) -> tuple[int, int, int]:
    match = _NAME.fullmatch(name)
    side, train, test = map(int, match.groups()) if match else (0, 0, 0)
    if side < _ITEM[0] or not train or not test:
        raise ConfigError(
            f"config.data.name={name!r}: write {NAME}/SIDE-TRAIN-TEST, the canvases' side in pixels (at least "
            f"{_ITEM[0]}) and their number in each split, for example {NAME}/56-20000-4000"
        )
    return side, train, test


class ClutteredFashionMnist(GeneratedSet):
    """TFDS set "cluttered_fashion_mnist": image uint8 [side, side, 1], label, box int32 [4]; splits train, test.

    Canvas i shows item i of the same split of Fashion-MNIST, over pieces of other items of that split. After the last
    item the items come again, over other pieces. `box` is that of `data.synthetic.clutter.Canvas`.
    """

    SPLITS = tuple(_SEEDS)

    def describe(self) -> tuple[str, dict[str, Any]]:
        config: ClutteredFashionMnistConfig = self.settings
        size = (config.side, config.side, 1)
        return config.description or "", {
            "image": tfds.features.Image(shape=size, encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(config.class_names)),
            "box": tfds.features.Tensor(shape=(4,), dtype=np.int32),
        }

    def examples(self, split: str) -> Iterator[dict[str, Any]]:
        config: ClutteredFashionMnistConfig = self.settings
        items, labels = read_split(config.source_dir, split)
        for i in range(getattr(config, split)):
            index = i % len(items)
            canvas = draw_canvas((_SEEDS[split], i), items, index, config.side)
            yield {
                "image": small_png(canvas.image),
                "label": int(labels[index]),
                "box": canvas.box.astype(np.int32),
            }
