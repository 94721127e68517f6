"""Metrics as (sum, count): the form that survives padding, uneven batches and many devices."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Shaped

from tosa_jax.ops.array_types import PerExample

Totals = dict[str, tuple[Shaped[ArrayLike, ""], Shaped[ArrayLike, ""]]]


def totals(values: Mapping[str, PerExample], mask: PerExample) -> Totals:
    """Per-example values -> (sum, count) over examples whose `mask` is 1; padding may hold anything."""
    count = mask.sum()
    return {
        name: (jnp.where(mask > 0, x.astype(jnp.float32), 0).sum(), count)
        for name, x in values.items()
    }


def add(left: Totals | None, right: Totals) -> Totals:
    """The totals of both; `left` None is nothing yet."""
    return right if left is None else jax.tree.map(lambda a, b: a + b, left, right)


def means(sums: Totals) -> dict[str, float]:
    """Totals -> means. Raises ZeroDivisionError where nothing was counted."""
    return {name: float(total) / float(count) for name, (total, count) in sums.items()}


def depth_errors(
    depth: Float[Array, "b height width"],
    truth: Float[Array, "b height width"],
    valid: Bool[Array, "b height width"],
) -> dict[str, PerExample]:
    """The errors of monocular depth (Eigen et al. 2014), over the valid pixels of each image; metres, float32.

    abs_rel, sq_rel, rms, log_rms, log10 and silog (100 times the standard deviation of the log difference, as in
    BTS and NeWCRFs) are better low; delta1, delta2, delta3, the shares of pixels within a factor of 1.25, 1.25^2 and
    1.25^3, high. 0 for an image without a valid pixel, of which nothing can be said.
    """
    depth, truth = (jnp.where(valid, x.astype(jnp.float32), 1) for x in (depth, truth))
    count = jnp.maximum(valid.sum(axis=(1, 2)), 1)

    def mean(x):
        return jnp.where(valid, x, 0).sum(axis=(1, 2)) / count

    difference, logs = depth - truth, jnp.log(depth) - jnp.log(truth)
    ratio = jnp.maximum(depth / truth, truth / depth)
    centred = logs - mean(logs)[:, None, None]
    return {
        "abs_rel": mean(jnp.abs(difference) / truth),
        "delta1": mean((ratio < 1.25).astype(jnp.float32)),
        "rms": jnp.sqrt(mean(difference**2)),
        "log10": mean(jnp.abs(logs)) / jnp.log(10.0),
        "silog": 100 * jnp.sqrt(mean(centred**2)),
        "sq_rel": mean(difference**2 / truth),
        "log_rms": jnp.sqrt(mean(logs**2)),
        "delta2": mean((ratio < 1.25**2).astype(jnp.float32)),
        "delta3": mean((ratio < 1.25**3).astype(jnp.float32)),
    }


def top_k_correct(
    logits: Float[Array, "b c"], labels: Int[Array, " b"], k: int
) -> Bool[Array, " b"]:
    """Whether the label is among the `k` largest logits; ties count for the lower class index."""
    label_logit = jnp.take_along_axis(logits, labels[:, None], axis=1)
    before = jnp.arange(logits.shape[1])[None] < labels[:, None]
    better = (logits > label_logit) | ((logits == label_logit) & before)
    # A network that gives NaN is wrong, not right by comparison.
    return (better.sum(axis=1) < k) & jnp.isfinite(label_logit[:, 0])
