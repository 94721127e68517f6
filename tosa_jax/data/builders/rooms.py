"""Rendered rooms as a TFDS builder, with the features of TFDS's "nyu_depth_v2" at any resolution; see `data.rooms`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from tosa_jax.data.builders.digits import png_bytes
from tosa_jax.data.synthetic.rooms import render_room
from tosa_jax.errors import ConfigError

_NAME = re.compile(r"(\d+)x(\d+)(?:-(\d+)-(\d+))?")
_COUNTS = (4000, 400)
_SEEDS = {"train": 0, "validation": 1}


@dataclass(kw_only=True)
class RoomsConfig(tfds.core.BuilderConfig):
    """Pixels, and rooms in the two splits."""

    height: int
    width: int
    train: int
    validation: int


def rooms_config(name: str) -> RoomsConfig:
    """ "HEIGHTxWIDTH" or "HEIGHTxWIDTH-TRAIN-VALIDATION", the rooms in each split (4000 and 400).

    Raises:
      ConfigError: `name` has another form, or one of the numbers is 0.
    """
    match = _NAME.fullmatch(name)
    numbers = (
        [int(n or default) for n, default in zip(match.groups(), (0, 0, *_COUNTS), strict=True)]
        if match
        else [0]
    )
    if not all(numbers):
        raise ConfigError(
            f"config.data.name={'/'.join(filter(None, ('rooms', name)))!r}: write rooms/HEIGHTxWIDTH, or "
            "rooms/HEIGHTxWIDTH-TRAIN-VALIDATION with the rooms in each split, for example "
            "rooms/128x160-4000-400"
        )
    height, width, train, validation = numbers
    return RoomsConfig(
        name=name,
        description=f"Rooms of {height}x{width} pixels.",
        height=height,
        width=width,
        train=train,
        validation=validation,
    )


class Rooms(tfds.core.GeneratorBasedBuilder):
    """TFDS set "rooms": image uint8 [height, width, 3], depth float16 [height, width] in metres."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}

    def _info(self) -> tfds.core.DatasetInfo:
        size = (self.builder_config.height, self.builder_config.width)
        # Bytes: NYU's own encoding writes each float16 as a float32.
        depth = tfds.features.Tensor(shape=size, dtype=np.float16, encoding="bytes")
        image = tfds.features.Image(shape=(*size, 3), encoding_format="png")
        return tfds.core.DatasetInfo(
            builder=self,
            description="Rendered rooms and their z-depth.",
            features=tfds.features.FeaturesDict({"image": image, "depth": depth}),
            supervised_keys=("image", "depth"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in _SEEDS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        for i in range(getattr(config, split)):
            image, depth = render_room((_SEEDS[split], i), config.height, config.width)
            yield i, {"image": png_bytes(image), "depth": depth.astype(np.float16)}
