"""Losses, one value an example: whoever takes a mean knows what it is taken over."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tosa_jax.ops.array_types import PerExample

Logits = Float[Array, "b c"]


def soft_cross_entropy(logits: Logits, targets: Float[Array, "b c"]) -> PerExample:
    """Cross-entropy in nats against a distribution over classes; computed in float32."""
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(axis=-1)


def smoothed_targets(
    labels: Int[Array, " b"], num_classes: int, smoothing: float
) -> Float[Array, "b c"]:
    """One-hot labels mixed with the uniform distribution (Szegedy et al. 2016): `smoothing` in [0, 1)."""
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def distillation_kl(logits: Logits, teacher_logits: Logits) -> PerExample:
    """Forward KL in nats from the teacher's distribution to the student's (Hinton et al. 2015, T = 1)."""
    log_student = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32))
    return (jnp.exp(log_teacher) * (log_teacher - log_student)).sum(axis=-1)


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
