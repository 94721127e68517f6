"""The base of builders that make example after example: small sets, which TFDS's own writer stores in seconds."""

import io
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def png_bytes(image: np.ndarray) -> io.BytesIO:
    """One uint8 image, [height, width] or [height, width, 3], as a PNG file in memory.

    TFDS takes a finished PNG as it is; to encode an array it would need TensorFlow.
    """
    buffer = io.BytesIO()
    # Level 1: the images are small, and preparing a set should take seconds.
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    buffer.seek(0)
    return buffer


class GeneratedSet(tfds.core.GeneratorBasedBuilder):
    """A builder of this project: version 1.0.0, nothing downloaded. Subclasses give `SPLITS` and two methods."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    SPLITS: ClassVar[tuple[str, ...]]

    @abstractmethod
    def describe(self) -> tuple[str, Mapping[str, Any]]:
        """One sentence on the set, and its features: the input first, then what is predicted."""

    @abstractmethod
    def examples(self, split: str) -> Iterator[dict[str, Any]]:
        """The examples of a split, in order. An example's key is its position."""

    @property
    def settings(self) -> Any:
        """The set's own `BuilderConfig`; None for a set without one."""
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        description, features = self.describe()
        return tfds.core.DatasetInfo(
            builder=self,
            description=description,
            features=tfds.features.FeaturesDict(dict(features)),
            supervised_keys=tuple(features)[:2],  # pyright: ignore[reportArgumentType]
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(self.examples(split))
