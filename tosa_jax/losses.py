"""Losses, one value an example: whoever takes a mean knows what it is taken over."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tosa_jax.array_types import AttnLogits, PerExample

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


def map_kl(true_logits: AttnLogits, log_predicted: Float[Array, "b h q k"]) -> PerExample:
    """Forward KL in nats from a true attention map, given by its logits, to the log of a predicted one.

    Mean over heads, summed over the query rows given.
    """
    log_true = jax.nn.log_softmax(true_logits, axis=-1)
    divergence = (jnp.exp(log_true) * (log_true - log_predicted)).sum(axis=-1)
    return divergence.mean(axis=1).sum(axis=-1)
