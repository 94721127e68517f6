"""Metrics as (sum, count), which are exact with padding, uneven batches and many devices."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Shaped

from tosa_jax.ops.array_types import PerExample

Totals = dict[str, tuple[Shaped[ArrayLike, ""], Shaped[ArrayLike, ""]]]


def totals(values: Mapping[str, PerExample], mask: PerExample) -> Totals:
    """Values [b] -> (sum, count) over the examples whose `mask` is 1. Values of padding are ignored, even NaN."""
    count = mask.sum()
    return {
        name: (jnp.where(mask > 0, x.astype(jnp.float32), 0).sum(), count)
        for name, x in values.items()
    }


def add(left: Totals | None, right: Totals) -> Totals:
    """The totals of both; `left` is None before the first batch."""
    return right if left is None else jax.tree.map(lambda a, b: a + b, left, right)


def means(sums: Totals) -> dict[str, float]:
    """Totals -> means. Raises ZeroDivisionError where nothing was counted."""
    return {
        name: np.asarray(total).item() / np.asarray(count).item()
        for name, (total, count) in sums.items()
    }


def top_k_correct(
    logits: Float[Array, "b c"], labels: Int[Array, " b"], k: int
) -> Bool[Array, " b"]:
    """Whether the label is among the `k` largest logits; ties count for the lower class index."""
    label_logit = jnp.take_along_axis(logits, labels[:, None], axis=1)
    before = jnp.arange(logits.shape[1])[None] < labels[:, None]
    better = (logits > label_logit) | ((logits == label_logit) & before)
    # Comparisons with NaN are false, which would make a NaN prediction correct.
    return (better.sum(axis=1) < k) & jnp.isfinite(label_logit[:, 0])
