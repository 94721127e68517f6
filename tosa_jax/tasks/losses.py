"""Losses, one value an example, and weights for their mean over a batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

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


def batch_weights(counts: Shaped[Array, " b"]) -> PerExample:
    """Weights of mean 1 in proportion to `counts` [b], which are not negative; all 0 where every count is.

    The mean of `weights * values` over the batch is then the mean of `values` weighted by the counts. Made of the whole
    batch, the weights give the same loss however the batch is split afterwards.
    """
    counts = counts.astype(jnp.float32)
    total = counts.sum()
    return counts * (len(counts) / jnp.where(total > 0, total, 1))
