"""Scores of tasks that predict any number of labels for an image."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from tosa_jax.ops.array_types import PerExample


def set_scores(
    right: Bool[Array, "b k"],
    taken: Bool[Array, "b k"],
    place: Int[Array, "b k"],
    labels: Shaped[Array, "b c"],
) -> dict[str, PerExample]:
    """How well k guesses match the labels of each image; a split's score is the mean over images.

    right   whether the guess is a label of the image. No two guesses that are right are the same label.
    taken   whether it is among the predicted labels.
    place   its place in the order of probability, from 0; k or more for one that does not count.
    labels  1 for each label that an image has.

    `recall` is the share of the image's labels that were predicted, `precision` the share of the predicted ones that
    are right (0 where none were), `f1` their harmonic mean, and `r_precision` the share of right ones among as many
    best guesses as the image has labels, which needs no threshold. All are 0 for an image without labels.
    """
    count = labels.astype(jnp.float32).sum(axis=1)
    hits, found = ((x.astype(jnp.float32)).sum(axis=1) for x in (right & taken, taken))
    best = (right & (place < count[:, None])).astype(jnp.float32).sum(axis=1)
    return {
        "f1": 2 * hits / jnp.maximum(count + found, 1),
        "recall": hits / jnp.maximum(count, 1),
        "precision": hits / jnp.maximum(found, 1),
        "r_precision": best / jnp.maximum(count, 1),
    }
