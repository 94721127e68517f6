"""The training loss and the error measures of monocular depth, one value an image."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tosa_jax.ops.array_types import PerExample


def silog(
    depth: Float[Array, "b height width"],
    truth: Float[Array, "b height width"],
    valid: Bool[Array, "b height width"],
    *,
    focus: float = 0.85,
) -> PerExample:
    """Scale-invariant log loss `10 sqrt(mean d^2 - focus mean(d)^2)`, `d = log depth - log truth`, over valid pixels.

    Eigen et al. 2014 under a root, as in BTS and NeWCRFs (cleinc/bts, aliyun/NeWCRFs), which pool the pixels of
    a batch; here it is one value an image, 0 for an image without a valid pixel. `focus` in [0, 1]; metres, float32.
    The gradient is finite everywhere, and 0 where every prediction equals the truth.
    """
    difference = log_difference(depth, truth, valid)
    count = jnp.maximum(valid.sum(axis=(1, 2)), 1)
    mean = difference.sum(axis=(1, 2)) / count
    # mean d^2 - mean(d)^2 as the mean of squares, which does not cancel.
    centred = jnp.where(valid, difference - mean[:, None, None], 0)
    spread = (centred**2).sum(axis=(1, 2)) / count + (1 - focus) * mean**2
    # The derivative of the root at 0 is infinite: another number is put under it there.
    return 10 * jnp.where(spread > 0, jnp.sqrt(jnp.where(spread > 0, spread, 1)), 0)


def log_difference(
    depth: Float[Array, "b height width"],
    truth: Float[Array, "b height width"],
    valid: Bool[Array, "b height width"],
) -> Float[Array, "b height width"]:
    """`log depth - log truth` in float32, 0 where not valid; a depth of 0 counts as a micrometre."""
    depth, truth = (x.astype(jnp.float32) for x in (depth, truth))
    logs = jnp.log(jnp.maximum(depth, 1e-6)) - jnp.log(jnp.where(valid, truth, 1))
    return jnp.where(valid, logs, 0)


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
