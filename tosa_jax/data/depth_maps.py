"""Depth maps: how the records of a depth set become {"image": uint8 [h w c], "depth": float32 [h w], metres}.

0 stands for "nothing was measured". A set has its depth in metres, as an array, or as 16-bit PNG files in some unit.
"""

import io
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from PIL import Image

from tosa_jax.data.decoding import BadImageError, open_image, pil_errors, to_array


@dataclass(frozen=True)
class DepthMaps:
    """An `ExampleKind` (`data.sources`) of pictures and their distances, both whole and of one size.

    scale  units of a PNG file in a metre; 0: the set has arrays in metres.
    size   height and width of evaluation examples.
    """

    channels: int
    scale: float
    size: tuple[int, int]
    name: ClassVar[str] = "depth"

    @property
    def encoded(self) -> tuple[str, ...]:
        """Features that TFDS must not decode."""
        return ("image", "depth") if self.scale else ("image",)

    def fields(self, features: dict) -> dict:
        """What a record keeps of a set's features."""
        return {"image": features["image"], "depth": features["depth"]}

    def cached(self, record: dict) -> dict:
        """The record with arrays that cannot be written. Raises BadImageError."""
        example = self._decode(record)
        if not self.scale:
            example["depth"] = record["depth"]  # float16 needs half the memory
        for array in example.values():
            array.flags.writeable = False
        return {**record, **example}

    def training_example(self, record: dict) -> dict:
        """The example, checked, of any size. Raises BadImageError."""
        if isinstance(record["image"], np.ndarray):  # cached, and so checked
            depth = record["depth"].astype(np.float32, copy=False)
            return {"image": record["image"], "depth": depth}
        return self._decode(record)

    def evaluation_example(self, record: dict) -> dict:
        """Raises BadImageError too where no pixel has a depth, or the size is not that of the others."""
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

    def blank(self) -> dict:
        """Zeros in the form of `evaluation_example`."""
        return {
            "image": np.zeros((*self.size, self.channels), np.uint8),
            "depth": np.zeros(self.size, np.float32),
        }

    def _decode(self, record: dict) -> dict:
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
    """Metres, float32, of a 16-bit grey PNG with `scale` units in a metre.

    Raises:
      BadImageError: the bytes are no PNG, or one of another kind: 8 bits are a picture of a depth map.
    """
    with pil_errors():
        image = Image.open(io.BytesIO(encoded))
        image.load()
    check_depth_png(image)
    return np.asarray(image).astype(np.float32) / np.float32(scale)


def check_depth_png(image: Image.Image) -> None:
    """Raises BadImageError unless an image, loaded or not, is a 16-bit grey PNG."""
    if image.format != "PNG" or not image.mode.startswith("I"):
        raise BadImageError(
            f"its depth map is {image.format or 'no file'} in mode {image.mode}, not a 16-bit grey PNG"
        )


def _times(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
