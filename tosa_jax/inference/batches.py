"""How any number of images become batches of the sizes that programs are compiled for."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tosa_jax.models.vit_config import check, plain_value
from tosa_jax.tasks.predictions import Prediction


def checked_sizes(sizes: Any) -> tuple[int, ...]:
    """Checked batch sizes. Raises ConfigError for none, or one below 1."""
    try:
        found = tuple(plain_value("batch_sizes", size, int) for size in sizes)
    except TypeError:
        found = ()
    check(
        len(found) > 0 and min(found) >= 1, f"batch_sizes={sizes!r} must be numbers of at least 1"
    )
    return found


def split_batch(count: int, sizes: Sequence[int]) -> list[int]:
    """Splits `count` images into batches of the given ascending sizes: few batches, at most half of one is padding.

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
    """Groups the indices of images by shape, in the order in which the shapes first occur.

    >>> by_shape([np.zeros(2), np.zeros(3), np.zeros(2)])
    [[0, 2], [1]]
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.shape, []).append(place)
    return list(places.values())


def rows_of(prediction: Prediction, rows: slice) -> Prediction:
    """The prediction for some of its images."""
    return jax.tree.map(lambda x: x[rows], prediction)
