"""Fashion-MNIST's items on cluttered canvases as a TFDS builder, made from the four IDX files; see `data.clutter`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from tosa_jax.data.builders.digits import png_bytes
from tosa_jax.data.builders.idx import fingerprint, idx_config, read_split
from tosa_jax.data.synthetic.clutter import draw_canvas
from tosa_jax.errors import ConfigError, DataError

NAME = "cluttered_fashion_mnist"  # in `data.name`, before the slash
_NAME = re.compile(rf"{NAME}/(\d+)-(\d+)-(\d+)")
_ITEM = (28, 28)
_SEEDS = {"train": 0, "test": 1}


@dataclass(kw_only=True)
class ClutteredFashionMnistConfig(tfds.core.BuilderConfig):
    """Side of a canvas in pixels, canvases in the two splits, and what they are made from."""

    side: int
    train: int
    test: int
    source_dir: str
    class_names: tuple[str, ...]


def config_name(name: str, source_dir: str | Path) -> str:
    """The name's part after "/", and the fingerprint of the files: "56-20000-4000-1a2b3c4d".

    Raises:
      ConfigError: `name` has another form than "cluttered_fashion_mnist/SIDE-TRAIN-TEST", a number is 0, or the side
        below 28.
      DataError: a file is missing or cannot be read.
    """
    return "-".join([*map(str, _numbers(name)), fingerprint(source_dir)])


def cluttered_config(name: str, source_dir: str | Path) -> ClutteredFashionMnistConfig:
    """Reads and checks all four files, so that preparing cannot fail half-way on a broken one.

    Raises:
      ConfigError, DataError: what `config_name` or `idx_config` raises; items that are not 28x28.
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


class ClutteredFashionMnist(tfds.core.GeneratorBasedBuilder):
    """TFDS set "cluttered_fashion_mnist": image uint8 [side, side, 1], label, box int32 [4]; splits train, test.

    Canvas i shows item i of the same split of Fashion-MNIST, whose items are in random order, and pieces of others of
    that split; past their number it begins again with other pieces. `box`: `data.clutter.Canvas`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        size = (config.side, config.side, 1)
        features = {
            "image": tfds.features.Image(shape=size, encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(config.class_names)),
            "box": tfds.features.Tensor(shape=(4,), dtype=np.int32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=config.description,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in _SEEDS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        items, labels = read_split(config.source_dir, split)
        for i in range(getattr(config, split)):
            index = i % len(items)
            canvas = draw_canvas((_SEEDS[split], i), items, index, config.side)
            yield (
                i,
                {
                    "image": png_bytes(canvas.image),
                    "label": int(labels[index]),
                    "box": canvas.box.astype(np.int32),
                },
            )
