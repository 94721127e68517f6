"""Canvases with one whole item among pieces of others: a task where it matters which tokens a network looks at.

After "cluttered MNIST" (Mnih et al. 2014, "Recurrent Models of Visual Attention"), with more and larger pieces. A
canvas shows everything at one scale, so that how fine a texture is does not tell the item from the pieces, and its
number of pieces follows from that scale, so that a canvas of small things is not an emptier one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

SMALLEST = 0.75
"""The smallest scale of a canvas; the largest is 1. On 56 pixels an item of 28 then fills 14 to 25 %, at least the area
of 27 patches of 4 pixels: a dozen, from .5 on, would hardly tell a coat from a shirt."""

PIECE_SIDES = (0.3, 0.5)
"""Smallest and largest side of a piece over the item's. At most a quarter of an item, so that no piece is whole; at
least two patches of 4 pixels at full scale, so that one patch cannot tell."""

CLUTTER = 0.4
"""Area of all pieces over that of the canvas. They overlap, and part of them is black: with Fashion-MNIST a fifth of
the canvas is clutter then, half as much again as the item, and half of the patches are black. Leaving those out
takes a network to a `keep_rate` of .5; below it, it has to find the item. Pieces never cover a canvas:
even if all were of the largest side, (0.5 / 0.4) ** 2 * 0.4 is below 1."""


class Canvas(NamedTuple):
    """A picture, and the item's square in it, in pixels: top, left, bottom, right, the last two exclusive."""

    image: UInt8[np.ndarray, "side side"]
    box: Int[np.ndarray, "4"]


def draw_canvas(
    seed: Sequence[int], items: UInt8[np.ndarray, "n s s"], index: int, side: int
) -> Canvas:
    """Item `index` whole, at a random scale and place, over pieces of the other items.

    `seed`, `items` and `side` alone decide what is drawn: every machine draws the same.

    Args:
      items: Grey squares on black; each may give pieces, whatever its class. One alone gives its own.
      side: Of the canvas, in pixels; at least `s`.
    """
    rng = np.random.default_rng(list(seed))
    full = items.shape[1]
    size = int(rng.integers(round(SMALLEST * full), full + 1))
    top, left = rng.integers(0, side - size + 1, size=2).tolist()
    image = _pieces(rng, items, index, size, side)
    item = _resized(items[index : index + 1], size)[0]
    place = image[top : top + size, left : left + size]
    # Where the item is black the clutter shows: its outline is its own.
    np.copyto(place, item, where=item > 0)
    return Canvas(image, np.array([top, left, top + size, left + size]))


def _pieces(
    rng: np.random.Generator, items: np.ndarray, index: int, size: int, side: int
) -> UInt8[np.ndarray, "side side"]:
    """A canvas of square pieces, turned and mirrored, of other items of `size`; the brighter one is in front."""
    low, high = round(PIECE_SIDES[0] * size), int(PIECE_SIDES[1] * size)
    count = round(CLUTTER * (side / ((low + high) / 2)) ** 2)
    others = (index + rng.integers(1, max(len(items), 2), size=count)) % len(items)
    sides = rng.integers(low, high + 1, size=count)
    choices = np.stack([size - sides + 1] * 2 + [side - sides + 1] * 2)  # from where, to where
    places = (rng.random(choices.shape) * choices).astype(int)
    turns = rng.integers(0, 8, size=count)
    image = np.zeros((side, side), np.uint8)
    for item, n, (top, left, down, right), turn in zip(
        _resized(items[others], size),
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
"""With and without exchanging rows and columns: the eight ways to turn and mirror a square."""


def _resized(items: UInt8[np.ndarray, "n s s"], size: int) -> UInt8[np.ndarray, "n t t"]:
    """Squares of `size`, antialiased; in one strip, as a call each would take most of the time."""
    n, full, _ = items.shape
    strip = Image.fromarray(items.reshape(n * full, full))
    strip = strip.resize((size, n * size), Image.Resampling.BILINEAR)
    return np.asarray(strip).reshape(n, size, size)
