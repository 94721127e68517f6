"""Clusters of tokens: soft ones on a grid, as superpixels, and groups around density peaks.

No gradient passes through a choice; what becomes a token of a cluster is a weighted mean of its members.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tosa_jax.ops.array_types import Scores, Tokens

Grid = tuple[int, int]
"""Rows and columns."""


def coarser(grid: Grid, keep_rate: float) -> Grid:
    """Rows and columns of cells, as near to the share `keep_rate` of a grid's places as whole numbers allow."""
    rows, columns = (max(1, round(side * keep_rate**0.5)) for side in grid)
    return rows, columns


def as_grid(count: int, grid: Grid) -> Grid:
    """Rows and columns that make `count`, in proportions as near to those of `grid` as can be."""
    rows, columns = grid
    pairs = [(h, count // h) for h in range(1, count + 1) if count % h == 0]
    return min(pairs, key=lambda pair: abs(pair[0] * columns - pair[1] * rows))


def squared_distances(a: Float[Array, "b n f"], b: Float[Array, "b m f"]) -> Float[Array, "b n m"]:
    """Squared Euclidean distance of each row of `a` from each row of `b`, float32, at least 0."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    squares = (a * a).sum(axis=2)[:, :, None] + (b * b).sum(axis=2)[:, None]
    return jnp.maximum(squares - 2 * jnp.einsum("bnf,bmf->bnm", a, b, precision="highest"), 0)


def pooling(grid: Grid, pooled: Grid) -> np.ndarray:
    """Weights [s n], float32, of the means by which adaptive average pooling makes `pooled` cells of a grid."""

    def along(size, cells):
        edges = [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]
        inside = np.array([[start <= j < end for j in range(size)] for start, end in edges])
        return inside / inside.sum(axis=1, keepdims=True)

    return np.kron(*(along(*sizes) for sizes in zip(grid, pooled, strict=True))).astype(np.float32)


def is_near(grid: Grid, pooled: Grid, window: int) -> np.ndarray:
    """Booleans [s n]: whether a cell of `pooled` is in the window around the cell in which a place of the grid lies."""

    def along(size, cells):
        own = np.arange(size) * cells // size
        return np.abs(own[None] - np.arange(cells)[:, None]) <= window // 2

    return np.kron(*(along(*sizes) for sizes in zip(grid, pooled, strict=True)))


def soft_clusters(
    patches: Tokens, grid: Grid, pooled: Grid, *, rounds: int, temperature: float, window: int
) -> Float[Array, "b s n"]:
    """Weights of each patch in each cluster, rows sum to 1: soft k-means whose clusters stay near their place.

    patches      [b n d] on a grid; centres begin as its means in `pooled` cells, their number s.
    rounds       of assigning patches to centres and moving these; at least 1.
    temperature  by which the squared distance counts in the softmax over clusters.
    window       odd: a patch belongs only to clusters whose cell is in this window around its own.

    Source: Expedit (Liang et al. 2022, arXiv 2210.01035), after superpixel sampling networks.
    """
    patches = jax.lax.stop_gradient(patches).astype(jnp.float32)
    far = jnp.where(jnp.asarray(is_near(grid, pooled, window)), 0.0, 1e16)[None]
    weights = jnp.broadcast_to(
        jnp.asarray(pooling(grid, pooled)), (patches.shape[0], *far.shape[1:])
    )
    for _ in range(rounds):
        centres = jnp.einsum("bsn,bnd->bsd", weights, patches, precision="highest")
        distances = squared_distances(centres, patches) + far
        belongs = jax.nn.softmax(-temperature * distances, axis=1)
        weights = belongs / jnp.maximum(belongs.sum(axis=2, keepdims=True), 1e-16)
    return weights


def reconstruction(
    patches: Tokens, centres: Float[Array, "b s d"], *, temperature: float, neighbours: int
) -> Float[Array, "b n s"]:
    """Weights by which patches are rebuilt from centres: the more, the nearer these were; rows of length 1.

    neighbours  how many centres, the nearest ones, count for a patch.
    """
    distances = squared_distances(*jax.lax.stop_gradient((patches, centres)))
    nearest = jnp.sort(distances, axis=2)
    limit = nearest[:, :, min(neighbours, nearest.shape[2]) - 1][:, :, None]
    # From the nearest one on: of all distances the exponential may be 0.
    weights = jnp.exp(-temperature * (distances - nearest[:, :, :1]))
    weights = jnp.where(distances <= limit, weights, 0)
    return weights / jnp.sqrt(jnp.square(weights).sum(axis=2, keepdims=True))


def density_peaks(distances: Float[Array, "b n n"], neighbours: int) -> Scores:
    """How much each point is a centre of its surroundings, [b n]: density times distance from any denser point.

    The density is `exp(-m)`, m the mean of the squared distances of the nearest `neighbours`, itself left out. The
    densest point gets the largest distance there is. Source: density peak clustering with nearest neighbours (Du et al.
    2016).
    """
    n = distances.shape[1]
    nearest = jnp.sort(distances, axis=2)[:, :, 1 : min(neighbours, n - 1) + 1]
    density = jnp.exp(-jnp.square(nearest).mean(axis=2))
    denser = density[:, None, :] > density[:, :, None]
    farthest = distances.max(axis=(1, 2), keepdims=True)
    return density * jnp.where(denser, distances, farthest).min(axis=2)
