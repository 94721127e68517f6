"""Labelled images: how the records of a classification set become {"image": uint8 [s s c], "label": int32}."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tosa_jax.data.decoding import Preprocess, to_array


@dataclass(frozen=True)
class LabelledImages:
    """An `ExampleKind` (`data.sources`): images in one form, or whole, as PIL's, for augmentations that crop."""

    form: Preprocess
    whole: bool = False
    name: ClassVar[str] = "classification"
    encoded: ClassVar[tuple[str, ...]] = ("image",)

    def fields(self, features: dict) -> dict:
        """What a record keeps of a set's features."""
        return {"image": features["image"], "label": np.int32(features["label"])}

    def cached(self, record: dict) -> dict:
        """The record with an array that cannot be written. Raises BadImageError."""
        encoded = record["image"]
        image = to_array(self.form.open(encoded)) if self.whole else self.form.decode(encoded)
        # Shared by every stream of this process: a transform that wrote would spoil it.
        image.flags.writeable = False
        return {**record, "image": image}

    def training_example(self, record: dict) -> dict:
        """The example before its augmentation; PIL's image where those crop. Raises BadImageError."""
        image = record["image"]
        if self.whole:
            image = self.form.open(image)
        elif not isinstance(image, np.ndarray):
            image = self.form.decode(image)
        return {"image": image, "label": record["label"]}

    def evaluation_example(self, record: dict) -> dict:
        """The example as it is scored. Raises BadImageError."""
        return self.training_example(record)

    def blank(self) -> dict:
        """Zeros in the form of `evaluation_example`."""
        size = self.form.image_size
        return {
            "image": np.zeros((size, size, self.form.channels), np.uint8),
            "label": np.int32(0),
        }
