"""Canvases with one whole item among pieces of other items: a task where it matters which tokens are selected.

After "cluttered MNIST" (Mnih et al. 2014, "Recurrent Models of Visual Attention"), with more and larger pieces. Item
and pieces of a canvas have the same scale, so that the fineness of a texture does not give the item away. At a smaller
scale there are more pieces, so that the share of clutter stays the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

SMALLEST = 0.75
"""Smallest scale of item and pieces; the largest is 1. An item of 28 pixels on a canvas of 56 then fills 14 to 25 % of
it: at least the area of 27 patches of 4 pixels. At a scale of 0.5 it is 12: too few to tell a coat from a shirt."""

PIECE_SIDES = (0.3, 0.5)
"""Smallest and largest side of a piece, as a share of the item's side. No piece has more than a quarter of an item's
area. At full scale a piece is at least two patches of 4 pixels wide, so that one patch cannot tell it from the item."""

CLUTTER = 0.4
"""Area of all pieces together, as a share of the canvas's area. Pieces overlap and are partly black: with Fashion-MNIST
a fifth of the canvas is visible clutter, 1.5 times the area of the item, and half of the patches are black. A model can
leave these out and reach a `keep_rate` of 0.5; below that it has to find the item. Pieces cannot cover a canvas: if all
had the largest side, their area would be (0.5 / 0.4) ** 2 * 0.4 = 0.625 of it."""


class Canvas(NamedTuple):
    """An image, and the item's square in it: top, left, bottom, right in pixels, the last two exclusive."""

    image: UInt8[np.ndarray, "side side"]
    box: Int[np.ndarray, "4"]


def draw_canvas(
    seed: Sequence[int], items: UInt8[np.ndarray, "n s s"], index: int, side: int
) -> Canvas:
    """Draws item `index`, whole, at a random scale and place, over pieces of the other items.

    The result depends on the arguments alone: it is the same on every machine.

    Args:
      items: Grey squares on black. Pieces come from items of any class; a single item gives its own.
      side: Of the canvas, pixels; at least `s`.
    """
    rng = np.random.default_rng(list(seed))
    full = items.shape[1]
    size = int(rng.integers(round(SMALLEST * full), full + 1))
    top, left = rng.integers(0, side - size + 1, size=2).tolist()
    image = _pieces(rng, items, index, size, side)
    item = resized(items[index : index + 1], size)[0]
    place = image[top : top + size, left : left + size]
    # The clutter shows where the item is black, so that the item has no square outline.
    np.copyto(place, item, where=item > 0)
    return Canvas(image, np.array([top, left, top + size, left + size]))


def _pieces(
    rng: np.random.Generator, items: np.ndarray, index: int, size: int, side: int
) -> UInt8[np.ndarray, "side side"]:
    """A canvas of square pieces of other items, scaled to `size`, rotated and mirrored. The brighter pixel shows."""
    low, high = round(PIECE_SIDES[0] * size), int(PIECE_SIDES[1] * size)
    count = round(CLUTTER * (side / ((low + high) / 2)) ** 2)
    others = (index + rng.integers(1, max(len(items), 2), size=count)) % len(items)
    sides = rng.integers(low, high + 1, size=count)
    choices = np.stack([size - sides + 1] * 2 + [side - sides + 1] * 2)  # from where, to where
    places = (rng.random(choices.shape) * choices).astype(int)
    turns = rng.integers(0, 8, size=count)
    image = np.zeros((side, side), np.uint8)
    for item, n, (top, left, down, right), turn in zip(
        resized(items[others], size),
        sides.tolist(),
        places.T.tolist(),
        turns.tolist(),
        strict=True,
    ):
        piece = item[top : top + n, left : left + n][_STEPS[turn % 4]]
        place = image[down : down + n, right : right + n]
        np.maximum(place, piece.T if turn > 3 else piece, out=place)
    return image


_STEPS = [(slice(None, None, i), slice(None, None, j)) for i in (1, -1) for j in (1, -1)]
"""With and without a transposition these are the eight rotations and reflections of a square."""


def resized(items: UInt8[np.ndarray, "n s s"], size: int) -> UInt8[np.ndarray, "n t t"]:
    """Resizes the items to `size` pixels, antialiased, in one strip: one call of PIL for each would be slow."""
    n, full, _ = items.shape
    strip = Image.fromarray(items.reshape(n * full, full))
    strip = strip.resize((size, n * size), Image.Resampling.BILINEAR)
    return np.asarray(strip).reshape(n, size, size)
