"""Fits in closed form what linear maps know of the update that bypassed tokens miss: the low-rank bypass, and the
choice by what it misses.

Reduced-rank regression (Izenman 1975) of the frozen dense network's update, over all layers of a group, on the
normalised tokens at its start; then, where `predicted_bypass` asks for it, of the logarithm of what is left of it. Only
sums over tokens are kept; no labels.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tosa_jax.models.bypass import BypassOptions, LowRank
from tosa_jax.models.methods.selective import SelectiveLayer
from tosa_jax.models.methods.worst_bypass import PredictedBypass
from tosa_jax.models.params import Params, get_params, set_params, split
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.ops.array_types import Images


class Moments(NamedTuple):
    """Sums over the patches of one group's inputs x and missed updates y: float32, fields by what is summed."""

    count: Float[Array, ""]
    x: Float[Array, " d"]
    y: Float[Array, " d"]
    xx: Float[Array, "d d"]
    xy: Float[Array, "d e"]


def groups_to_fit(model: VisionTransformer, needs: Callable[[nnx.Module], bool]) -> dict[int, int]:
    """First -> last layer of each group whose first layer's kind `needs` fitting."""
    found, first = {}, None
    for spec in (kind.spec for kind in model.kinds):
        first = spec.layer if spec.opens else first
        if spec.closes and first is not None and needs(model.kinds[first]):
            found[first] = spec.layer
    return found


def _has_low_rank(kind: nnx.Module) -> bool:
    return isinstance(kind, SelectiveLayer) and isinstance(kind.bypass, LowRank)


def _predicts_misses(kind: nnx.Module) -> bool:
    return isinstance(kind, PredictedBypass)


def moments(
    model: VisionTransformer, images: Images, groups: Mapping[int, int], *, of_misses: bool = False
) -> dict[int, Moments]:
    """The sums over normalised images [b height width c], by first layer of a group; the network runs densely.

    y is the update [d] that a token misses or, with `of_misses`, the logarithm [1] of how far its bypass is from it.
    """
    prefix = model.config.num_prefix_tokens
    tokens, starts, found = model.embed(images), {}, {}
    for layer, block in enumerate(model.blocks):
        if layer in groups:
            starts[layer] = tokens
        tokens, _ = block(tokens)
        for first, last in groups.items():
            if last == layer:
                before, opening = starts[first], model.blocks[first]
                y = tokens - before
                if of_misses:
                    kind = model.kinds[first]
                    assert isinstance(kind, PredictedBypass)  # `groups` names these alone
                    missed = kind.missed(opening, before, tokens)
                    y = jnp.log(jnp.maximum(missed, jnp.finfo(jnp.float32).tiny))[:, :, None]
                x, y = (v[:, prefix:] for v in (opening.norm1(before), y))
                x, y = (v.reshape(-1, v.shape[-1]).astype(jnp.float32) for v in (x, y))
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


def _sums(
    model: VisionTransformer,
    batches: Iterable[Images],
    groups: Mapping[int, int],
    *,
    of_misses: bool = False,
) -> dict[int, Moments]:
    """`moments` of all images, on the host."""
    graphdef, params = split(model)

    @jax.jit
    def step(params, images):
        return moments(set_params(graphdef, params), images, groups, of_misses=of_misses)

    total = None
    for images in batches if groups else ():
        part = step(params, images)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return jax.device_get(total or {})


def fit_bypass(
    model: VisionTransformer, batches: Iterable[Images], *, ridge: float = 1e-3
) -> Params:
    """The fitted parameters of every low-rank bypass of `model`, and of choices by what a bypass misses, by path.

    {} where there are none.

    batches  normalised images [b height width c], all of one size; a few hundred images are enough. They are held
             only where both are to be fitted, one after the other.
    """
    own, fitted = get_params(model), {}

    def add(at: str, values: Mapping[str, np.ndarray]) -> None:
        fitted.update({
            f"{at}/{name}": jnp.asarray(x, own[f"{at}/{name}"].dtype) for name, x in values.items()
        })  # fmt: skip

    bypasses, choices = (groups_to_fit(model, needs) for needs in (_has_low_rank, _predicts_misses))
    batches = list(batches) if bypasses and choices else batches
    for first, sums in _sums(model, batches, bypasses).items():
        down, up, bias = solve(sums, model.config.options_of(BypassOptions).bypass_rank, ridge)
        add(f"kinds/{first}/bypass", {"down/kernel": down, "up/kernel": up, "up/bias": bias})
    model = set_params(split(model)[0], own | fitted)
    for first, sums in _sums(model, batches, choices, of_misses=True).items():
        down, up, bias = solve(sums, 1, ridge)
        add(f"kinds/{first}/miss", {"kernel": down @ up, "bias": bias})
    return fitted
