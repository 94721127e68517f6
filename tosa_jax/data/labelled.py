"""Labelled images: records of a classification set -> {"image": uint8 [s s c], "label": int32}.

Of a set with several labels an image -> {"image": the same, "labels": uint8 [classes], 1 for those it has}.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from tosa_jax.data.decoding import Preprocess, to_array
from tosa_jax.data.examples import Augmentation, Example, ExampleKind, Record
from tosa_jax.data.settings import DataConfig
from tosa_jax.data.transforms import AUGMENTATIONS, CROPS, make_augmentation
from tosa_jax.errors import ConfigError


@dataclass(frozen=True)
class LabelledImages(ExampleKind):
    """Images with one class each.

    preprocess  what an image becomes: a square.
    whole       training examples hold whole PIL images instead, for augmentations that crop.
    """

    preprocess: Preprocess
    whole: bool = False
    name: ClassVar[str] = "classification"
    field: ClassVar[str] = "label"
    blank_label: ClassVar[Any] = 0  # of an example of zeros
    augmentations: ClassVar[Iterable[str]] = AUGMENTATIONS

    @classmethod
    def matches(cls, features: Mapping[str, Any]) -> bool:
        return isinstance(features.get("label"), tfds.features.ClassLabel)

    @classmethod
    def check_settings(cls, config: DataConfig) -> None:
        if config.augment == "deit" and config.channels != 3:
            raise ConfigError("augment='deit' is for channels=3: use 'crop_flip' for grey images")

    @classmethod
    def of_split(
        cls,
        config: DataConfig,
        features: Mapping[str, Any],
        image_size: tuple[int, int],
        *,
        train: bool,
    ) -> ExampleKind:
        del features, image_size
        return cls(config.preprocess, train and config.augment in CROPS)

    @classmethod
    def augmentation(cls, config: DataConfig) -> Augmentation | None:
        return make_augmentation(config.augment, config.size[0])

    @classmethod
    def example_bytes(cls, config: DataConfig) -> int:
        return config.size[0] * config.size[1] * config.channels

    @classmethod
    def class_names(cls, features: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(features["label"].names)

    @property
    def encoded(self) -> tuple[str, ...]:
        return ("image",)

    def fields(self, features: Record) -> Record:
        return {"image": features["image"], self.field: self.target(features[self.field])}

    def target(self, label: Any) -> Any:
        """What batches hold of a stored label."""
        return np.int32(label)

    def cached(self, record: Record) -> Record:
        encoded = record["image"]
        if self.whole:
            image = to_array(self.preprocess.open(encoded))
        else:
            image = self.preprocess.decode(encoded)
        # Every stream of this process shares the array: a transform that wrote to it would spoil it.
        image.flags.writeable = False
        return {**record, "image": image}

    def training_example(self, record: Record) -> Example:
        image = record["image"]
        if self.whole:
            image = self.preprocess.open(image)
        elif not isinstance(image, np.ndarray):
            image = self.preprocess.decode(image)
        return {"image": image, self.field: record[self.field]}

    def evaluation_example(self, record: Record) -> Example:
        return self.training_example(record)

    def blank(self) -> Example:
        size = self.preprocess.image_size
        assert isinstance(size, int), "`DataConfig.preprocess` always makes squares"
        image = np.zeros((size, size, self.preprocess.channels), np.uint8)
        return {"image": image, self.field: self.target(self.blank_label)}


@dataclass(frozen=True)
class LabelSets(LabelledImages):
    """Images with any number of classes each.

    num_classes  of the set.
    """

    num_classes: int = 0
    name: ClassVar[str] = "label_sets"
    field: ClassVar[str] = "labels"
    blank_label: ClassVar[Any] = ()

    @classmethod
    def matches(cls, features: Mapping[str, Any]) -> bool:
        labels = features.get("labels")
        return isinstance(labels, tfds.features.Sequence) and isinstance(
            labels.feature, tfds.features.ClassLabel
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
        kind: Any = super().of_split(config, features, image_size, train=train)
        return replace(kind, num_classes=len(cls.class_names(features)))

    @classmethod
    def class_names(cls, features: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(features["labels"].feature.names)

    def target(self, label: Any) -> Any:
        found = np.zeros(self.num_classes, np.uint8)
        found[np.asarray(label, int)] = 1
        return found
