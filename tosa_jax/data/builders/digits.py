"""The handwritten digits that come with scikit-learn, as a TFDS builder: 1797 grey 8x8 images.

Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (the test part of it).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tosa_jax.data.builders.generated import GeneratedSet, small_png

_MAX_GREY = 16  # the set's grey levels are 0..16
_TEST_SHARE = 0.2


def load_digits_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 8, 8] and labels int64 [n] of "train" (1437) or "test" (360).

    The split is random, stratified by class, and always the same. The set itself is ordered by
    writer: a cut by position would give the test split other writers and uneven classes.
    """
    # Imported here: a run on another data set should not wait for scikit-learn.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    grey, labels = load_digits(return_X_y=True)
    images = np.rint(np.asarray(grey) * (255 / _MAX_GREY)).astype(np.uint8).reshape(-1, 8, 8)
    train_x, test_x, train_y, test_y = map(
        np.asarray,
        train_test_split(images, labels, test_size=_TEST_SHARE, stratify=labels, random_state=0),
    )
    return {"train": (train_x, train_y), "test": (test_x, test_y)}[split]


class Digits(GeneratedSet):
    """TFDS set "digits": image uint8 [8, 8, 1], label 0..9, splits train (1437) and test (360)."""

    SPLITS = ("train", "test")

    def describe(self) -> tuple[str, dict[str, Any]]:
        return "scikit-learn's handwritten digits, split 80/20 by class.", {
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
        }

    def examples(self, split: str) -> Iterator[dict[str, Any]]:
        for image, label in zip(*load_digits_split(split), strict=True):
            yield {"image": small_png(image), "label": int(label)}
