"""The base of builders that make example after example: small sets, which TFDS's own writer stores in seconds."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from tosa_jax.paths import png_bytes


def small_png(image: np.ndarray) -> bytes:
    """A small uint8 image as a PNG file: TFDS would need TensorFlow to encode an array.

    Compressed little, so that preparing a set takes seconds.
    """
    return png_bytes(image, compress_level=1)


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
