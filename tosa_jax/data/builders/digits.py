"""The handwritten digits that come with scikit-learn, as a TFDS builder: 1797 grey 8x8 images.

Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (the test part of it).
"""

import io
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

_MAX_GREY = 16  # the set's grey levels are 0..16
_TEST_SHARE = 0.2


def load_digits_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 8, 8] and labels int64 [n] of "train" (1437) or "test" (360).

    The split is random, stratified by class and fixed: the set's own order goes by writer, so a cut
    by position would test on other writers than it trains on, unevenly over the classes.
    """
    # Imported here: who reads another data set should not pay for scikit-learn.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    grey, labels = load_digits(return_X_y=True)
    images = np.rint(grey * (255 / _MAX_GREY)).astype(np.uint8).reshape(-1, 8, 8)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=_TEST_SHARE, stratify=labels, random_state=0
    )
    return {"train": (train_x, train_y), "test": (test_x, test_y)}[split]


def png_bytes(image: np.ndarray) -> io.BytesIO:
    """One uint8 image, [height, width] or [height, width, 3], as a PNG file in memory."""
    buffer = io.BytesIO()
    # Level 1: the images are tiny, and preparing a set should take seconds.
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    buffer.seek(0)
    return buffer


class Digits(tfds.core.GeneratorBasedBuilder):
    """TFDS set "digits": image uint8 [8, 8, 1], label 0..9, splits train (1437) and test (360)."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="scikit-learn's handwritten digits, split 80/20 by class.",
            features=features,
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        for i, (image, label) in enumerate(zip(*load_digits_split(split), strict=True)):
            # TFDS encodes a NumPy image with TensorFlow; it takes a finished PNG without.
            yield i, {"image": png_bytes(image), "label": int(label)}
