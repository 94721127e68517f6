"""Fits the low-rank bypass in closed form: what a linear map of rank r knows of the update that bypassed tokens miss.

Reduced-rank regression (Izenman 1975) of the frozen dense network's update, over all layers of a group, on the
normalised tokens at its start. Only sums over tokens are kept, so that images stream through; no labels.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tosa_jax.array_types import Images
from tosa_jax.models.bypass import LowRank
from tosa_jax.models.params import Params, get_params, set_params, split
from tosa_jax.models.vit import VisionTransformer


class Moments(NamedTuple):
    """Sums over the patches of one group's inputs x and missed updates y: float32, fields by what is summed."""

    count: Float[Array, ""]
    x: Float[Array, " d"]
    y: Float[Array, " d"]
    xx: Float[Array, "d d"]
    xy: Float[Array, "d e"]


def groups_to_fit(model: VisionTransformer) -> dict[int, int]:
    """First -> last layer of each group whose bypass is fitted."""
    found, first = {}, None
    for place in (kind.place for kind in model.kinds):
        first = place.layer if place.opens else first
        if place.closes and isinstance(getattr(model.kinds[first], "bypass", None), LowRank):
            found[first] = place.layer
    return found


def moments(model: VisionTransformer, images: Images) -> dict[int, Moments]:
    """The sums over normalised images [b height width c], by first layer of a group; the network runs densely."""
    groups, prefix = groups_to_fit(model), model.config.num_prefix_tokens
    tokens, starts, found = model.embed(images), {}, {}
    for layer, block in enumerate(model.blocks):
        if layer in groups:
            starts[layer] = tokens
        tokens, _ = block(tokens)
        for first, last in groups.items():
            if last == layer:
                before = starts[first]
                update = (tokens - before)[:, prefix:]
                x = model.blocks[first].norm1(before)[:, prefix:]
                x, y = (v.reshape(-1, v.shape[-1]).astype(jnp.float32) for v in (x, update))
                count = jnp.asarray(len(x), jnp.float32)
                found[first] = Moments(count, x.sum(0), y.sum(0), x.T @ x, x.T @ y)
    return found


def solve(sums: Moments, rank: int, ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """down [d r], up [r d] and bias [d] of the best map of this rank, with a ridge relative to the mean variance."""
    count, x, y, xx, xy = (np.asarray(v, np.float64) for v in sums)
    x_mean, y_mean = x / count, y / count
    cov_xx = xx / count - np.outer(x_mean, x_mean)
    cov_xy = xy / count - np.outer(x_mean, y_mean)
    lam = ridge * np.trace(cov_xx) / len(cov_xx)
    full = np.linalg.solve(cov_xx + lam * np.eye(len(cov_xx)), cov_xy)
    # The rank that loses least of what the full map predicts: principal axes of its predictions.
    _, axes = np.linalg.eigh(full.T @ cov_xx @ full)
    axes = axes[:, ::-1][:, :rank]
    return full @ axes, axes.T, y_mean - x_mean @ full @ axes @ axes.T


def fit_bypass(
    model: VisionTransformer, batches: Iterable[Images], *, ridge: float = 1e-3
) -> Params:
    """The fitted parameters of every low-rank bypass of `model`, by path; {} where there are none.

    batches  normalised images [b height width c], all of one size; a few hundred images are enough.
    """
    graphdef, params = split(model)
    step = jax.jit(lambda p, images: moments(set_params(graphdef, p), images))
    total = None
    for images in batches if groups_to_fit(model) else ():
        part = step(params, images)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    fitted = {}
    for first, sums in (total or {}).items():
        down, up, bias = solve(jax.device_get(sums), model.kinds[first].bypass.rank, ridge)
        at = f"kinds/{first}/bypass"
        fitted |= {f"{at}/down/kernel": down, f"{at}/up/kernel": up, f"{at}/up/bias": bias}
    own = get_params(model)
    return {path: jnp.asarray(x, own[path].dtype) for path, x in fitted.items()}
