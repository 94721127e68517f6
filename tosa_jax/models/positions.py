"""Learned positions on another grid: PyTorch's interpolations, in NumPy.

All are separable, so each is one small matrix a side. Their names are the values of `ViTConfig.pos_resample`:

bicubic_antialias  `F.interpolate(size=..., mode="bicubic", antialias=True)`: Keys' kernel with a = -0.5, as wide as the
                   step where the grid shrinks, normalised over what lies inside (PIL's rule). Of timm, and for DINOv2
                   with registers also of transformers and of Facebook's hub.
bilinear_antialias `mode="bilinear", antialias=True`: the triangle, widened and normalised likewise. Of SigLIP 2's
                   NaFlex.
bicubic            the same without antialias: Keys' kernel with a = -0.75, edges repeated. Of transformers.
bicubic_offset     that with `scale_factor=(new + 0.1) / old` in place of the size, so that the samples are taken a
                   little too close together. Of Facebook's hub (DINOv2 without registers) and of Depth Anything's code.
bilinear           `mode="bilinear"` without antialias, edges repeated. Of DPT, its own code and transformers'.

All have `align_corners=False`. Sources: aten/src/ATen/native/UpSample.h and cpu/UpSampleKernel.cpp of PyTorch;
`interpolate_pos_encoding` of facebookresearch/dinov2; `_resize_pos_embed` of transformers' DPT.
"""

import math

import numpy as np
from jaxtyping import Float

RESAMPLINGS = (
    "bicubic_antialias",
    "bilinear_antialias",
    "bicubic",
    "bicubic_offset",
    "bilinear",
)

_OFFSET = 0.1  # patches: `interpolate_offset` of facebookresearch/dinov2


def _keys_kernel(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981) at distances `x`."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _triangle(x: np.ndarray) -> np.ndarray:
    """The kernel of linear interpolation at distances `x`."""
    return np.maximum(1 - np.abs(x), 0.0)


def resample_matrix(old: int, new: int, how: str) -> Float[np.ndarray, "new old"]:
    """The float64 matrix that takes `old` samples of a line to `new` ones; `how` is one of `RESAMPLINGS`."""
    scale = old / (new + _OFFSET if how == "bicubic_offset" else new)
    matrix = np.zeros((new, old))
    for row in range(new):
        center = scale * (row + 0.5)
        if how.endswith("_antialias"):
            linear = how.startswith("bilinear")
            stretch = max(scale, 1.0)
            reach = stretch if linear else 2 * stretch
            low = max(int(center - reach + 0.5), 0)
            high = min(int(center + reach + 0.5), old)
            distances = (np.arange(low, high) + 0.5 - center) / stretch
            weights = _triangle(distances) if linear else _keys_kernel(distances, -0.5)
            matrix[row, low:high] = weights / weights.sum()
        else:
            taps = math.floor(center - 0.5) + np.arange(-1, 3)
            distances = taps + 0.5 - center
            linear = how == "bilinear"
            weights = _triangle(distances) if linear else _keys_kernel(distances, -0.75)
            np.add.at(matrix[row], np.clip(taps, 0, old - 1), weights)
    return matrix


def resample_positions(
    positions: Float[np.ndarray, "1 old d"],
    grid: tuple[int, int],
    how: str,
    old_grid: tuple[int, int] | None = None,
) -> Float[np.ndarray, "1 new d"]:
    """Positions of a grid -> those of `grid` (rows, columns), float32; `how` is one of `RESAMPLINGS`.

    old_grid  rows and columns of `positions`; None: a square.

    An equal grid goes through untouched, as in timm, transformers and DINOv2. Raises ValueError: no such grid.
    """
    side = math.isqrt(positions.shape[1])
    old = old_grid or (side, side)
    if math.prod(old) != positions.shape[1]:
        raise ValueError(f"{positions.shape[1]} positions are no grid of {old[0]}x{old[1]}")
    if grid == old:
        return positions
    square = np.asarray(positions, np.float64).reshape(*old, -1)
    rows, columns = (resample_matrix(*sides, how) for sides in zip(old, grid, strict=True))
    moved = np.einsum("ij,kl,jld->ikd", rows, columns, square, optimize=True)
    return moved.reshape(1, grid[0] * grid[1], -1).astype(np.float32)
