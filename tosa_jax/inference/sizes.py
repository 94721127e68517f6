"""Few image sizes for pictures of many, where a model takes images of any size and each size needs a program.

A picture is resized to the size that suits it best, and what is predicted for each of its pixels is resized back.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from tosa_jax.inference.batches import by_shape, rows_of
from tosa_jax.models.vit_config import are_many, check, plain_value
from tosa_jax.tasks.predictions import Prediction

Size = tuple[int, int]
"""Height and width in pixels."""


def checked_program_sizes(sizes: Any, resizes: bool) -> tuple[Size, ...]:
    """The sizes (height, width) that were given, where one number is the side of a square.

    resizes  whether the model takes images of any size.

    Raises ConfigError: no such sizes, or some for a model of one size.
    """
    known = f"program_sizes={sizes!r}"
    check(are_many(sizes), f"{known} must be a list of sizes: (height, width), or one number")
    found = []
    for size in sizes:
        sides = tuple(size) if are_many(size) else (size, size)
        check(len(sides) == 2, f"{known} must have sizes of one number, or of height and width")
        height, width = (plain_value("program_sizes", side, int) for side in sides)
        check(min(height, width) >= 1, f"{known} must be of at least one pixel")
        found.append((height, width))
    check(
        resizes or not found,
        f"{known} is for models that take images of any size, such as depth models: leave it out",
    )
    return tuple(found)


def best_size(size: Size, sizes: Sequence[Size]) -> Size:
    """The one of `sizes` that suits a picture of `size` best; its own where there are none.

    A change of the proportion counts four times as much as one of the area, both as ratios.

    >>> [best_size(size, ((480, 640), (640, 480))) for size in ((470, 640), (4000, 3000))], best_size((5, 7), ())
    ([(480, 640), (640, 480)], (5, 7))
    """

    def change(other: Size) -> float:
        tall, wide = (math.log(new / old) for new, old in zip(other, size, strict=True))
        return abs(wide - tall) + abs(wide + tall) / 4

    return min(sizes, key=change, default=size)


def each_at(
    run: Callable[[np.ndarray], Prediction], images: Sequence[np.ndarray], sizes: Sequence[Size]
) -> list[Prediction]:
    """`run` on images of different sizes, each uint8 [height, width, c], at the one of `sizes` that suits each best.

    Those of one size are in one call. Returns a `Prediction` of one row for each image, at the image's own size.
    """
    own = [image.shape[:2] for image in images]
    shown = [resized(x, best_size(x.shape[:2], sizes)) for x in images]
    found: dict[int, Prediction] = {}
    for places in by_shape(shown):
        out, computed = run(np.stack([shown[i] for i in places])), shown[places[0]].shape[:2]
        for row, i in enumerate(places):
            found[i] = at_size(rows_of(out, slice(row, row + 1)), computed, own[i])
    return [found[i] for i in range(len(images))]


def several_sizes(kept: int, own: Size) -> str:
    """What is said where images have so many sizes that of their programs only `kept` are kept."""
    return (
        f"images of so many sizes need more than {kept} programs, and each takes long to compile; for few programs "
        f"name sizes at which pictures run: program_sizes=[({own[0]}, {own[1]}), ...] of Predictor, or "
        f"--program_sizes={own[0]}x{own[1]},... of predict"
    )


def resized(image: UInt8[np.ndarray, "h w c"], size: Size) -> UInt8[np.ndarray, "H W c"]:
    """The image at another size, bilinear, antialiased where it becomes smaller; itself where the size is the same."""
    if image.shape[:2] == size:
        return image
    return np.stack([_resized(x, size) for x in np.moveaxis(image, 2, 0)], axis=2)


def at_size(prediction: Prediction, computed: Size, size: Size) -> Prediction:
    """The prediction for images of `size`, made of one for the same images at the size `computed`.

    Predictions that have a value for each pixel are resized as by `resized`. Selected tokens stay those of the patches
    of the size `computed`.
    """
    if size == computed:
        return prediction

    def back(values: np.ndarray) -> np.ndarray:
        maps = values.shape[1:] == computed
        return np.stack([_resized(x, size) for x in values]) if maps else values

    changed = {name: back(values) for name, values in prediction.predictions.items()}
    return prediction._replace(predictions=changed)


def _resized(pixels: UInt8[np.ndarray, "h w"] | Float[np.ndarray, "h w"], size: Size) -> np.ndarray:
    picture, (height, width) = Image.fromarray(np.ascontiguousarray(pixels)), size
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
