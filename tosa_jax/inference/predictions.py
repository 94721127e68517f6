"""What a network says of images, on the host."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Guess(NamedTuple):
    """A class, its name, and its probability in [0, 1]."""

    label: int
    name: str
    probability: float


class Prediction(NamedTuple):
    """What a network says of `b` images.

    logits    float32 [b c]; None from a depth network.
    selected  one int32 [b s] a selection: indices into the tokens, ascending, prefix included.
    scores    one float [b n] a selection: what it chose by, higher is better.
    depth     float32 [b height width], metres; None from a classifier.
    """

    logits: np.ndarray | None
    selected: tuple[np.ndarray, ...]
    scores: tuple[np.ndarray, ...]
    depth: np.ndarray | None = None

    @property
    def probabilities(self) -> np.ndarray:
        """float32 [b c], each row sums to 1."""
        powers = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


def split_batch(count: int, sizes: Sequence[int]) -> list[int]:
    """Sizes, ascending, that hold `count` images in order: as few as go with at most half of one padding.

    >>> split_batch(70, (1, 8, 64)), split_batch(9, (1, 8, 64))
    ([64, 8], [8, 1])
    """
    chosen = []
    while count > 0:
        fitting = [size for size in sizes if size <= count]
        padded = next((size for size in sizes if size >= count), sizes[-1])
        size = padded if padded <= 2 * count or not fitting else fitting[-1]
        chosen.append(size)
        count -= size
    return chosen


def by_shape(images: Sequence[np.ndarray]) -> list[list[int]]:
    """The places of the images of each shape, ascending, in the order in which shapes come up.

    >>> by_shape([np.zeros(2), np.zeros(3), np.zeros(2)])
    [[0, 2], [1]]
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.shape, []).append(place)
    return list(places.values())
