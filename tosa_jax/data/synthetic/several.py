"""Canvases with several items of different classes, each in a cell of its own: sets with several labels an image."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from tosa_jax.data.synthetic.clutter import SMALLEST, resized


class SeveralItems(NamedTuple):
    """An image, the classes of its items in ascending order, and the square of each.

    A square is top, left, bottom, right in pixels, the last two exclusive.
    """

    image: UInt8[np.ndarray, "side side"]
    labels: Int[np.ndarray, " m"]
    boxes: Int[np.ndarray, "m 4"]


def cells_of(side: int, most: int) -> tuple[int, int]:
    """Cells along a side of the canvas, so that `most` have room, and their side in pixels."""
    count = math.isqrt(most - 1) + 1
    return count, side // count


def draw_several(
    seed: Sequence[int], groups: Sequence[UInt8[np.ndarray, "_ s s"]], side: int, most: int
) -> SeveralItems:
    """Draws 1 to `most` items of different classes on black: each number is as likely, and so is each class.

    The result depends on the arguments alone: it is the same on every machine. An item has 0.75 to 1 of the side of
    its cell, at a random place in it.

    Args:
      groups: Grey squares on black, by class; a class without any is not drawn.
      side: Of the canvas, pixels.
      most: At most the number of classes that have items.
    """
    rng = np.random.default_rng(list(seed))
    count, cell = cells_of(side, most)
    there = np.flatnonzero([len(group) > 0 for group in groups])
    labels = np.sort(rng.choice(there, int(rng.integers(1, most + 1)), replace=False))
    image, boxes = np.zeros((side, side), np.uint8), []
    for label, place in zip(labels, rng.permutation(count**2), strict=False):
        item = int(rng.integers(len(groups[label])))
        size = int(rng.integers(round(SMALLEST * cell), cell + 1))
        corner = np.array(divmod(int(place), count)) * cell
        top, left = corner + rng.integers(0, cell - size + 1, size=2)
        (drawn,) = resized(groups[label][item : item + 1], size)
        image[top : top + size, left : left + size] = drawn
        boxes.append((top, left, top + size, left + size))
    return SeveralItems(image, labels, np.array(boxes))
