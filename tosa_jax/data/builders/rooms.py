"""Rendered rooms as a TFDS builder, with the features of TFDS's "nyu_depth_v2"; `data.synthetic.rooms` renders them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tosa_jax.data.builders.generated import GeneratedSet, small_png
from tosa_jax.data.synthetic.rooms import render_room
from tosa_jax.errors import ConfigError

_NAME = re.compile(r"(\d+)x(\d+)(?:-(\d+)-(\d+))?")
_COUNTS = (4000, 400)
_SEEDS = {"train": 0, "validation": 1}


@dataclass(kw_only=True)
class RoomsConfig(tfds.core.BuilderConfig):
    """Height and width of an image in pixels, and the number of rooms in each split."""

    height: int
    width: int
    train: int
    validation: int


def rooms_config(name: str) -> RoomsConfig:
    """Reads "HEIGHTxWIDTH-TRAIN-VALIDATION": pixels, and the rooms in each split (if left out, 4000 and 400).

    Raises:
      ConfigError: `name` has another form, or one of the numbers is 0.
    """
    match = _NAME.fullmatch(name)
    given = match.groups() if match else (0, 0, 0, 0)
    height, width, train, validation = (
        int(n or default) for n, default in zip(given, (0, 0, *_COUNTS), strict=True)
    )
    if not (height and width and train and validation):
        raise ConfigError(
            f"config.data.name={'/'.join(filter(None, ('rooms', name)))!r}: write rooms/HEIGHTxWIDTH, or "
            "rooms/HEIGHTxWIDTH-TRAIN-VALIDATION with the rooms in each split, for example "
            "rooms/128x160-4000-400"
        )
    return RoomsConfig(
        name=name,
        description=f"Rooms of {height}x{width} pixels.",
        height=height,
        width=width,
        train=train,
        validation=validation,
    )


class Rooms(GeneratedSet):
    """TFDS set "rooms": image uint8 [height, width, 3], depth float16 [height, width] in metres."""

    SPLITS = tuple(_SEEDS)

    def describe(self) -> tuple[str, dict[str, Any]]:
        size = (self.settings.height, self.settings.width)
        # "bytes": TFDS's own encoding of nyu_depth_v2 stores each float16 as a float32.
        depth = tfds.features.Tensor(shape=size, dtype=np.float16, encoding="bytes")
        image = tfds.features.Image(shape=(*size, 3), encoding_format="png")
        return "Rendered rooms and their z-depth.", {"image": image, "depth": depth}

    def examples(self, split: str) -> Iterator[dict[str, Any]]:
        config: RoomsConfig = self.settings
        for i in range(getattr(config, split)):
            image, depth = render_room((_SEEDS[split], i), config.height, config.width)
            yield {"image": small_png(image), "depth": depth.astype(np.float16)}
