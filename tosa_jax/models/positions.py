"""Learned positions on another grid: PyTorch's two bicubic interpolations, in NumPy.

Both are separable, so each is one small matrix a side. `bicubic` is `F.interpolate(mode="bicubic",
align_corners=False)`, Keys' kernel with a = -0.75, edges repeated; `bicubic_antialias` adds
`antialias=True`: the kernel with a = -0.5, as wide as the step where the grid shrinks, and
normalised over what lies inside (PIL's rule). Source: aten/src/ATen/native/UpSample.h and
cpu/UpSampleKernel.cpp of PyTorch.
"""

import math

import numpy as np
from jaxtyping import Float


def _keys_kernel(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981) at distances `x`."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resample_matrix(old: int, new: int, how: str) -> Float[np.ndarray, "new old"]:
    """The float64 matrix that takes `old` samples of a line to `new` ones; `how` is `ViTConfig.pos_resample`."""
    scale = old / new
    matrix = np.zeros((new, old))
    for row in range(new):
        center = scale * (row + 0.5)
        if how == "bicubic":
            first = math.floor(center - 0.5) - 1
            taps = np.arange(first, first + 4)
            weights = _keys_kernel(taps + 0.5 - center, -0.75)
            np.add.at(matrix[row], np.clip(taps, 0, old - 1), weights)
        else:
            stretch = max(scale, 1.0)
            low = max(int(center - 2 * stretch + 0.5), 0)
            high = min(int(center + 2 * stretch + 0.5), old)
            weights = _keys_kernel((np.arange(low, high) + 0.5 - center) / stretch, -0.5)
            matrix[row, low:high] = weights / weights.sum()
    return matrix


def resample_positions(
    positions: Float[np.ndarray, "1 old d"], grid: tuple[int, int], how: str
) -> Float[np.ndarray, "1 new d"]:
    """Positions of a square grid -> those of `grid` (rows, columns), float32; `how` is
    `ViTConfig.pos_resample`.

    A grid of the same size goes through untouched, as in timm and transformers. Raises ValueError: no square.
    """
    side = math.isqrt(positions.shape[1])
    if side * side != positions.shape[1]:
        raise ValueError(f"{positions.shape[1]} positions are no square grid")
    if grid == (side, side):
        return positions
    square = np.asarray(positions, np.float64).reshape(side, side, -1)
    rows, columns = (resample_matrix(side, new, how) for new in grid)
    moved = np.einsum("ij,kl,jld->ikd", rows, columns, square, optimize=True)
    return moved.reshape(1, grid[0] * grid[1], -1).astype(np.float32)
