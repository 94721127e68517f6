"""What an example of a data set is: the interface between stored records and the examples of a batch."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import grain
import numpy as np

from tosa_jax.data.settings import DataConfig

Record = dict[str, Any]
"""A stored example. It has the features that `ExampleKind.fields` keeps, "image" among them, and:

    index  int, its position in the split
    name   str, its file name; "" if the set stores none
"""

Example = dict[str, Any]
"""One row of a batch: arrays and NumPy scalars by name."""


class Augmentation(grain.transforms.RandomMap):
    """A random change of single training examples."""

    @abstractmethod
    def random_map(self, element: Any, rng: np.random.Generator) -> Any:
        """The changed example; `element` itself stays as it is. All draws come from `rng`."""


class ExampleKind(ABC):
    """A kind of data set: how its records become examples.

    The class says which sets and settings belong to it. An instance belongs to one split. Instances are hashable
    and are pickled for worker processes. Methods that decode raise BadImageError for a record that makes no example.
    """

    name: ClassVar[str]
    augmentations: ClassVar[Iterable[str]]  # the values of `DataConfig.augment` for such sets

    @classmethod
    @abstractmethod
    def matches(cls, features: Mapping[str, Any]) -> bool:
        """Whether a set with these TFDS features is of this kind."""

    @classmethod
    @abstractmethod
    def check_settings(cls, config: DataConfig) -> None:
        """Checks the settings that only this kind reads, whatever set is named. Raises ConfigError."""

    @classmethod
    @abstractmethod
    def of_split(
        cls,
        config: DataConfig,
        features: Mapping[str, Any],
        image_size: tuple[int, int],
        *,
        train: bool,
    ) -> "ExampleKind":
        """The kind for one split. Raises ConfigError if the settings do not suit the set.

        Args:
          features: The set's TFDS features.
          image_size: Height and width of the split's first image, pixels.
          train: Whether examples will be augmented.
        """

    @classmethod
    @abstractmethod
    def augmentation(cls, config: DataConfig) -> Augmentation | None:
        """What `config.augment` does to a training example; None: nothing."""

    @classmethod
    @abstractmethod
    def example_bytes(cls, config: DataConfig) -> int:
        """Size in memory of one training example."""

    @classmethod
    def class_names(cls, features: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels; () for a kind without classes."""
        del features
        return ()

    @property
    @abstractmethod
    def encoded(self) -> tuple[str, ...]:
        """Features that TFDS must hand over as encoded bytes."""

    @abstractmethod
    def fields(self, features: Record) -> Record:
        """The features that a record keeps."""

    @abstractmethod
    def cached(self, record: Record) -> Record:
        """The record decoded, to be kept in memory. Its arrays are read-only."""

    @abstractmethod
    def training_example(self, record: Record) -> Example:
        """The example before its augmentation, decoded and checked."""

    @abstractmethod
    def evaluation_example(self, record: Record) -> Example:
        """The example as it is scored. All of a split have the same shapes."""

    @abstractmethod
    def blank(self) -> Example:
        """An `evaluation_example` of zeros."""
