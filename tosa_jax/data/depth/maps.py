"""Depth maps: records of a depth set -> {"image": uint8 [h w c], "depth": float32 [h w] in metres}.

A depth of 0 means that nothing was measured there. Sets store depth as arrays in metres, or as 16-bit PNG files in a
unit that `DataConfig.depth_scale` gives.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float
from PIL import Image

from tosa_jax.data.decoding import BadImageError, load, open_image, to_array
from tosa_jax.data.depth.transforms import DEPTH_AUGMENTATIONS, DepthAugment
from tosa_jax.data.examples import Augmentation, Example, ExampleKind, Record
from tosa_jax.data.settings import DataConfig
from tosa_jax.errors import ConfigError


@dataclass(frozen=True)
class DepthMaps(ExampleKind):
    """Images with a depth map each, of the same height and width.

    scale  units in a metre of depth maps stored as PNG files; 0: they are arrays in metres.
    size   height and width of evaluation examples, pixels.
    """

    channels: int
    scale: float
    size: tuple[int, int]
    name: ClassVar[str] = "depth"
    augmentations: ClassVar[Iterable[str]] = DEPTH_AUGMENTATIONS

    @classmethod
    def matches(cls, features: Mapping[str, Any]) -> bool:
        depth: Any = features.get("depth")
        if isinstance(depth, tfds.features.Image):
            return depth.np_dtype == np.uint16
        if isinstance(depth, tfds.features.Tensor):
            info: Any = depth.get_tensor_info()
            return info.np_dtype.kind == "f" and len(info.shape) == 2
        return False

    @classmethod
    def check_settings(cls, config: DataConfig) -> None:
        if not (math.isfinite(config.depth_scale) and config.depth_scale >= 0):
            raise ConfigError(f"depth_scale={config.depth_scale} must be 0 or more")
        box = config.depth_box
        if box and (len(box) != 4 or not (0 <= box[0] < box[1] and 0 <= box[2] < box[3])):
            raise ConfigError(
                f"depth_box={box} must be four pixel positions, top < bottom and left < right, for "
                "example (45, 472, 43, 608)"
            )

    @classmethod
    def of_split(
        cls,
        config: DataConfig,
        features: Mapping[str, Any],
        image_size: tuple[int, int],
        *,
        train: bool,
    ) -> ExampleKind:
        del train
        files = isinstance(features["depth"], tfds.features.Image)
        if files and not config.depth_scale:
            raise ConfigError(
                f"config.data.depth_scale is missing: the depth maps of {config.name!r} are 16-bit PNG "
                "files; set it to their units in a metre (NYU Depth V2 1000, KITTI 256)"
            )
        if config.depth_scale and not files:
            raise ConfigError(
                f"config.data.depth_scale={config.depth_scale}, but {config.name!r} has its depth in "
                "metres: set it to 0"
            )
        top, bottom, left, right = config.depth_box or (0, image_size[0], 0, image_size[1])
        # `trust_box` cuts an image to the box only where a crop is taken of it.
        largest = image_size if config.size == image_size else (bottom - top, right - left)
        if any(have < want for have, want in zip(largest, config.size, strict=True)):
            raise ConfigError(
                f"config.model.image_size={config.size}: the images of {config.name!r} have only "
                f"{largest[0]}x{largest[1]} pixels"
                f"{' within config.data.depth_box' if largest != image_size else ''}; set it to at most {largest}"
            )
        return cls(config.channels, config.depth_scale, image_size)

    @classmethod
    def augmentation(cls, config: DataConfig) -> Augmentation | None:
        return DepthAugment(config.size, config.augment, config.depth_box)

    @classmethod
    def example_bytes(cls, config: DataConfig) -> int:
        return config.size[0] * config.size[1] * (config.channels + 4)  # 4: float32 depth

    @property
    def encoded(self) -> tuple[str, ...]:
        return ("image", "depth") if self.scale else ("image",)

    def fields(self, features: Record) -> Record:
        return {"image": features["image"], "depth": features["depth"]}

    def cached(self, record: Record) -> Record:
        example = self._decode(record)
        if not self.scale:
            example["depth"] = record["depth"]  # as stored: float16 takes half the memory
        for array in example.values():
            array.flags.writeable = False
        return {**record, **example}

    def training_example(self, record: Record) -> Example:
        if isinstance(record["image"], np.ndarray):  # from `cached`, which has checked it
            depth = record["depth"].astype(np.float32, copy=False)
            return {"image": record["image"], "depth": depth}
        return self._decode(record)

    def evaluation_example(self, record: Record) -> Example:
        """`training_example`; BadImageError too for another size than the split's, and for a map of zeros."""
        example = self.training_example(record)
        depth = example["depth"]
        if depth.shape != self.size:
            raise BadImageError(
                f"it has {_times(depth.shape)} pixels, others of the split {_times(self.size)}; "
                "cut them to one size"
            )
        if not depth.any():
            raise BadImageError("no pixel of its depth map has a measurement: all are 0")
        return example

    def blank(self) -> Example:
        return {
            "image": np.zeros((*self.size, self.channels), np.uint8),
            "depth": np.zeros(self.size, np.float32),
        }

    def _decode(self, record: Record) -> Example:
        image = to_array(open_image(record["image"], channels=self.channels))
        depth = depth_of_png(record["depth"], self.scale) if self.scale else record["depth"]
        depth = depth.astype(np.float32, copy=False)
        if depth.shape != image.shape[:2]:
            raise BadImageError(
                f"its depth map has {_times(depth.shape)} pixels, the image "
                f"{_times(image.shape[:2])}"
            )
        if not np.isfinite(depth).all():
            raise BadImageError("its depth map holds values that are not finite: write 0 there")
        if depth.min() < 0:
            raise BadImageError(f"its depth map goes down to {depth.min():.3g} m, below 0")
        return {"image": image, "depth": depth}


def depth_of_png(encoded: bytes, scale: float) -> Float[np.ndarray, "h w"]:
    """Decodes a 16-bit grey PNG file to float32 metres; `scale` is the number of its units in a metre.

    Raises:
      BadImageError: the bytes are no 16-bit grey PNG. An 8-bit one shows depth as colours and holds no distances.
    """
    image = load(encoded)
    check_depth_png(image)
    return np.asarray(image).astype(np.float32) / np.float32(scale)


def check_depth_png(image: Image.Image) -> None:
    """Raises BadImageError unless an image is a 16-bit grey PNG. Its pixels need not be loaded."""
    if image.format != "PNG" or not image.mode.startswith("I"):
        raise BadImageError(
            f"its depth map is {image.format or 'no file'} in mode {image.mode}, not a 16-bit grey PNG"
        )


def _times(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
