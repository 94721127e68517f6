"""Fits the linear maps of layer kinds (`LayerKind.linear_fits`) in closed form, such as those of the low-rank bypass.

The method is reduced-rank regression (Izenman 1975) from the normalised tokens at the start of a group of layers to
what the frozen dense network makes of them. It needs no labels, and keeps only sums over tokens.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tosa_jax.models.params import Params, get_params, set_params, split
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.ops.array_types import Images


class Moments(NamedTuple):
    """Sums over the patches of inputs x [d] and targets y [e], float32; fields are named by what is summed."""

    count: Float[Array, ""]
    x: Float[Array, " d"]
    y: Float[Array, " e"]
    xx: Float[Array, "d d"]
    xy: Float[Array, "d e"]


def groups_to_fit(model: VisionTransformer, turn: int) -> dict[int, int]:
    """The groups of layers that have more than `turn` maps to fit: number of the first layer -> of the last one."""
    found, first = {}, None
    for spec in (kind.spec for kind in model.kinds):
        first = spec.layer if spec.opens else first
        if spec.closes and first is not None and len(model.kinds[first].linear_fits()) > turn:
            found[first] = spec.layer
    return found


def moments(
    model: VisionTransformer, images: Images, groups: Mapping[int, int], turn: int
) -> dict[int, Moments]:
    """The sums over normalised images [b height width c] for the map number `turn` of each group, by its first layer.

    The network runs densely, whatever its plan.
    """
    prefix = model.config.num_prefix_tokens
    tokens, starts, found = model.embed(images), {}, {}
    rotary = model.rotary(model.config.grid)
    for layer, block in enumerate(model.blocks):
        if layer in groups:
            starts[layer] = tokens
        tokens, _ = block(tokens, rotary=rotary)
        for first, last in groups.items():
            if last == layer:
                before, opening = starts[first], model.blocks[first]
                y = model.kinds[first].linear_fits()[turn].target(opening, before, tokens)
                x, y = (v[:, prefix:] for v in (opening.norm1(before), y))
                x, y = (v.reshape(-1, v.shape[-1]).astype(jnp.float32) for v in (x, y))
                count = jnp.asarray(len(x), jnp.float32)
                found[first] = Moments(count, x.sum(0), y.sum(0), x.T @ x, x.T @ y)
    return found


def solve(sums: Moments, rank: int, ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best linear map of this rank, in float64: down [d r], up [r e] and bias [e].

    It makes `x @ down @ up + bias` as close to y as possible, in the mean of squares over all tokens.

    ridge  weight of the penalty on the map, relative to the mean variance of x.
    """
    count, x, y, xx, xy = (np.asarray(v, np.float64) for v in sums)
    x_mean, y_mean = x / count, y / count
    cov_xx = xx / count - np.outer(x_mean, x_mean)
    cov_xy = xy / count - np.outer(x_mean, y_mean)
    lam = ridge * np.trace(cov_xx) / len(cov_xx)
    full = np.linalg.solve(cov_xx + lam * np.eye(len(cov_xx)), cov_xy)
    # The principal axes of what the full map predicts: of all maps of this rank, they lose least of it.
    _, axes = np.linalg.eigh(full.T @ cov_xx @ full)
    axes = axes[:, ::-1][:, :rank]
    return full @ axes, axes.T, y_mean - x_mean @ full @ axes @ axes.T


def _sums(
    model: VisionTransformer, batches: Iterable[Images], groups: Mapping[int, int], turn: int
) -> dict[int, Moments]:
    """`moments` of all images, as NumPy arrays."""
    graphdef, params = split(model)

    @jax.jit
    def step(params, images):
        return moments(set_params(graphdef, params), images, groups, turn)

    total = None
    for images in batches:
        part = step(params, images)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return jax.device_get(total or {})


def fit_bypass(
    model: VisionTransformer, batches: Iterable[Images], *, ridge: float = 1e-3
) -> Params:
    """The fitted parameters of every linear map of the model's layer kinds, by path; {} if there are none.

    batches  normalised images [b height width c], all of one size; a few hundred images are enough. They are kept in
             memory if a group of layers has several maps, which are fitted one after the other.
    ridge    as in `solve`.
    """
    turns = []
    while groups := groups_to_fit(model, len(turns)):
        turns.append(groups)
    batches = list(batches) if len(turns) > 1 else batches
    own, fitted = get_params(model), {}
    for turn, groups in enumerate(turns):
        for first, sums in _sums(model, batches, groups, turn).items():
            fit = model.kinds[first].linear_fits()[turn]
            for name, value in fit.params(*solve(sums, fit.rank, ridge)).items():
                path = f"kinds/{first}/{name}"
                fitted[path] = jnp.asarray(value, own[path].dtype)
        model = set_params(split(model)[0], own | fitted)
    return fitted
