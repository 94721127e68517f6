"""RandAugment as DeiT trains with it: timm's policy string `rand-m9-mstd0.5-inc1`.

Two operations for each image are drawn uniformly with replacement. Each is applied with probability
0.5, at a magnitude drawn from N(9, 0.5) and clipped to [0, 10]. "inc" means that every operation is
stronger at a larger magnitude. After Cubuk et al. 2020 (arXiv 1909.13719) and timm's
`auto_augment.py`, from which all numbers below are; its set of operations has no Cutout.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

FILL = (124, 116, 104)  # colour of pixels that come in from outside: ImageNet's mean
# The numbers of the policy string.
NUM_OPS, PROBABILITY = 2, 0.5
MAGNITUDE, MAGNITUDE_STD, MAX_MAGNITUDE = 9.0, 0.5, 10.0

_BICUBIC = Image.Resampling.BICUBIC
_TRANSPOSE = Image.Transpose.TRANSPOSE
_MAX_DEGREES, _MAX_SHEAR, _MAX_TRANSLATE, _MAX_ENHANCE = 30.0, 0.3, 0.45, 0.9
_SOLARIZE_ADD_BELOW = 128
_EDGE = 20  # columns of padding: more than _MAX_SHEAR * _BLOCK and the width of the filter
_BLOCK = 48  # rows at a time: their arrays fit the cache, and malloc reuses their memory

# The argument of each operation. m in [0, 1] is the magnitude over the largest magnitude, `sign` is
# -1 or 1. Integers are truncated, not rounded, as in timm.
ARGUMENTS: dict[str, Callable[[float, float], int | float]] = {
    "AutoContrast": lambda m, sign: 0,
    "Equalize": lambda m, sign: 0,
    "Invert": lambda m, sign: 0,
    "Rotate": lambda m, sign: sign * m * _MAX_DEGREES,  # degrees, anticlockwise
    "Posterize": lambda m, sign: 4 - int(m * 4),  # bits that are kept
    "Solarize": lambda m, sign: 256 - min(256, int(m * 256)),  # inverted from this value on
    "SolarizeAdd": lambda m, sign: min(128, int(m * 110)),  # added to values below 128
    "Color": lambda m, sign: max(0.1, 1 + sign * m * _MAX_ENHANCE),  # 1: unchanged
    "Contrast": lambda m, sign: max(0.1, 1 + sign * m * _MAX_ENHANCE),
    "Brightness": lambda m, sign: max(0.1, 1 + sign * m * _MAX_ENHANCE),
    "Sharpness": lambda m, sign: max(0.1, 1 + sign * m * _MAX_ENHANCE),
    "ShearX": lambda m, sign: sign * m * _MAX_SHEAR,  # pixels a row
    "ShearY": lambda m, sign: sign * m * _MAX_SHEAR,
    "TranslateX": lambda m, sign: sign * m * _MAX_TRANSLATE,  # share of the side
    "TranslateY": lambda m, sign: sign * m * _MAX_TRANSLATE,
}
NAMES = tuple(ARGUMENTS)  # what `draw_operations` draws from


def draw_operations(rng: np.random.Generator) -> list[tuple[str, int | float]]:
    """Draws the operations to apply, in order, as (name, argument): none, one or two."""
    drawn = []
    for number in rng.integers(len(NAMES), size=NUM_OPS).tolist():
        apply, turn = rng.random(2).tolist()
        magnitude = min(max(rng.normal(MAGNITUDE, MAGNITUDE_STD), 0.0), MAX_MAGNITUDE)
        if apply < PROBABILITY:
            sign = -1.0 if turn < 0.5 else 1.0
            drawn.append((NAMES[number], ARGUMENTS[NAMES[number]](magnitude / MAX_MAGNITUDE, sign)))
    return drawn


def rand_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Applies the operations of `draw_operations` to an RGB image. The size stays."""
    for name, argument in draw_operations(rng):
        image = OPERATIONS[name](image, argument)
    return image


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keeps the highest `bits` of each value. 0 makes the image black; recent versions of PIL refuse it."""
    return image.point([i & (256 - 2 ** (8 - bits)) for i in range(256)] * 3)


def solarize_add(image: Image.Image, added: int) -> Image.Image:
    """Adds `added` to values below 128, up to 255."""
    table = [min(255, i + added) if i < _SOLARIZE_ADD_BELOW else i for i in range(256)]
    return image.point(table * 3)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    """Equal to PIL's ImageEnhance.Sharpness, but faster: factor 0 is the smoothed image, 1 the image itself."""
    pixels = np.asarray(image)
    smooth = pixels.copy()  # pixels at the border are not smoothed
    if min(image.size) > 2:
        wide = pixels.astype(np.uint16)
        total = wide[:-2] + wide[1:-1] + wide[2:]
        total = total[:, :-2] + total[:, 1:-1] + total[:, 2:] + 4 * wide[1:-1, 1:-1]
        smooth[1:-1, 1:-1] = (total + 6) // 13
    return Image.blend(Image.fromarray(smooth), image, factor)


def shear_x(image: Image.Image, factor: float) -> Image.Image:
    """out[y, x] = in[y, x + factor * (y + 0.5)]; |factor| at most 0.3."""
    return _move_rows(image, factor * (np.arange(image.height) + 0.5))


def shear_y(image: Image.Image, factor: float) -> Image.Image:
    """out[y, x] = in[y + factor * (x + 0.5), x]; |factor| at most 0.3."""
    return shear_x(image.transpose(_TRANSPOSE), factor).transpose(_TRANSPOSE)


def translate_x(image: Image.Image, share: float) -> Image.Image:
    """out[y, x] = in[y, x + share * width]."""
    return _move_rows(image, np.full(image.height, share * image.width))


def translate_y(image: Image.Image, share: float) -> Image.Image:
    """out[y, x] = in[y + share * height, x]."""
    return translate_x(image.transpose(_TRANSPOSE), share).transpose(_TRANSPOSE)


def _move_rows(image: Image.Image, shifts: np.ndarray) -> Image.Image:
    """out[y, x] = in[y, x + shifts[y]], bicubic; FILL where that is outside.

    Equal to PIL's bicubic AFFINE transform up to one grey level. That one takes several times as
    long: it weighs 16 neighbours, though only four have a weight other than 0.
    """
    width, height = image.size
    pixels = np.empty((height, width + 2 * _EDGE, 3), np.uint8)
    pixels[:, _EDGE:-_EDGE] = np.asarray(image)
    pixels[:, :_EDGE], pixels[:, -_EDGE:] = pixels[:, _EDGE, None], pixels[:, -_EDGE - 1, None]
    result = np.empty((height, 3 * width), np.uint8)
    result[:] = np.tile(np.asarray(FILL, np.uint8), width)
    # Columns [first, last) of the output come from inside: x + 0.5 + shift is in [0, width).
    first = np.clip(np.ceil(-0.5 - shifts).astype(int), 0, width)
    last = np.clip(np.ceil(width - 0.5 - shifts).astype(int), first, width)
    whole = np.floor(shifts).astype(int)
    weights = _bicubic_weights(shifts - whole)
    for top in range(0, height, _BLOCK):
        rows = slice(top, top + _BLOCK)
        _blend_rows(*(part[rows] for part in (pixels, result, whole, first, last, weights)))
    return Image.fromarray(result.reshape(height, width, 3))


def _blend_rows(
    pixels: np.ndarray,
    result: np.ndarray,
    whole: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    weights: np.ndarray,
) -> None:
    """Does some rows of `_move_rows`. Their shifts must differ by at most _EDGE."""
    low, high = int(first.min()), int(last.max())
    if high <= low:
        return
    height, count = len(pixels), 3 * (high - low)
    pixels = pixels.reshape(height, -1)  # NumPy is slow over an innermost axis of 3
    taken = np.empty((height, count + 9), np.float32)
    starts = (3 * (low + _EDGE - 1 + whole)).tolist()
    moved_alike = all(array[0] == array[-1] for array in (whole, first, last))
    if moved_alike:
        taken[:] = pixels[:, starts[0] : starts[0] + count + 9]
    else:
        for row, start in enumerate(starts):
            taken[row] = pixels[row, start : start + count + 9]
    neighbours = np.lib.stride_tricks.as_strided(
        taken, (height, count, 4), (taken.strides[0], 4, 12), writeable=False
    )
    out = np.einsum("rxk,rk->rx", neighbours, weights)
    # PIL truncates. A thousandth more keeps rounding errors from turning an integer into the one below.
    out += np.float32(1e-3)
    out = np.clip(out, 0, 255, out=out).astype(np.uint8)
    if moved_alike:
        result[:, 3 * low : 3 * high] = out
    else:
        for row, (left, right) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            result[row, 3 * left : 3 * right] = out[row, 3 * (left - low) : 3 * (right - low)]


def _bicubic_weights(x: np.ndarray) -> np.ndarray:
    """Weights float32 [rows, 4] of the neighbours at -1, 0, 1 and 2, for fractions x in [0, 1).

    Keys' kernel with a = -1, as in PIL's transforms (PIL's resizing has a = -0.5).
    """
    x2, x3 = x * x, x * x * x
    weights = np.stack([-x + 2 * x2 - x3, 1 - 2 * x2 + x3, x + x2 - x3, -x2 + x3], axis=1)
    return weights.astype(np.float32)


OPERATIONS: dict[str, Callable[[Image.Image, Any], Image.Image]] = {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
    "Rotate": lambda image, degrees: image.rotate(degrees, _BICUBIC, fillcolor=FILL),
    "Posterize": posterize,
    "Solarize": ImageOps.solarize,
    "SolarizeAdd": solarize_add,
    "Color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "Contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "Brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "Sharpness": sharpness,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
}
"""Name -> operation(image, argument), with the arguments of `ARGUMENTS`."""
