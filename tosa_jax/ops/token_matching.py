"""Representatives: the selected token most like a bypassed one, whose update it shares.

A selected token and those it stands in for are a group. Similarity is the cosine of features; no gradient passes
through any choice.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from tosa_jax.ops.array_types import Scores, Tokens
from tosa_jax.ops.token_selection import Selection, complement, gather_tokens, select_tokens

# Summing groups and spreading over them are each other's transpose, with derivatives of their own: no float
# scatter-add is compiled.


@jax.custom_vjp
def sum_groups(values: Tokens, selection: Selection) -> Float[Array, "b s d"]:
    """values [b n d] -> the sum over each selected token and those it stands in for [b s d]."""
    sums = gather_tokens(values, selection)
    others = complement(selection)
    if not others.indices.shape[1]:
        return sums
    places = jnp.take_along_axis(selection.slot, others.indices, axis=1)
    hot = jax.nn.one_hot(places, sums.shape[1], dtype=values.dtype)
    moved = gather_tokens(values, others)
    return sums + jnp.einsum("bms,bmd->bsd", hot, moved, precision="highest")


@jax.custom_vjp
def spread_groups(values: Float[Array, "b s d"], selection: Selection) -> Tokens:
    """values [b s d] -> [b n d]: each token gets that of the selected token it is or has as its representative."""
    return jnp.take_along_axis(values, selection.slot[:, :, None], axis=1, mode="promise_in_bounds")


def _sum_forward(values, selection):
    return sum_groups(values, selection), selection


def _spread_forward(values, selection):
    return spread_groups(values, selection), selection


sum_groups.defvjp(_sum_forward, lambda selection, grad: (spread_groups(grad, selection), None))
spread_groups.defvjp(_spread_forward, lambda selection, grad: (sum_groups(grad, selection), None))


def cosines(a: Float[Array, "b n f"], b: Float[Array, "b m f"]) -> Float[Array, "b n m"]:
    """Cosine similarity of each row of `a` with each of `b`, in float32; no gradient passes."""

    def unit(x):
        x = jax.lax.stop_gradient(x).astype(jnp.float32)
        return x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + 1e-12)

    return jnp.einsum("bnf,bmf->bnm", unit(a), unit(b))


def with_representatives(
    features: Float[Array, "b n f"], selection: Selection, num_prefix_tokens: int
) -> Selection:
    """The selection in which each bypassed token has the selected patch most like it as its representative."""
    others = complement(selection)
    similarity = cosines(gather_tokens(features, others), gather_tokens(features, selection))
    nearest = _argmax_patch(similarity, num_prefix_tokens)
    slot = jnp.take_along_axis(nearest, others.slot, axis=1)
    return selection._replace(slot=jnp.where(selection.mask, selection.slot, slot))


def bipartite_matching(
    features: Float[Array, "b n f"], count: int, num_prefix_tokens: int
) -> tuple[Selection, Scores]:
    """Bypasses the `n - count` most redundant patches, each with the one most like it as its representative.

    Every second patch may be bypassed, the others stand in for them, as in ToMe's bipartite matching (Bolya et al.
    2023, "Token Merging: Your ViT But Faster"). `count` is at least `least_after_matching(n, prefix)`.

    The scores are 1 - cosine to the representative, in [0, 2], and 3 for those that stay.
    """
    n = features.shape[1]
    places = np.arange(n)
    may_leave = (places >= num_prefix_tokens) & ((places - num_prefix_tokens) % 2 == 0)
    number = np.where(may_leave, (places - num_prefix_tokens) // 2, 0)  # among those that may
    stay = places[~may_leave]
    similarity = cosines(features[:, places[may_leave]], features[:, stay])
    likeness = similarity[:, :, num_prefix_tokens:].max(axis=-1)
    scores = jnp.where(may_leave[None], 1 - likeness[:, number], 3.0)
    selection = select_tokens(scores, count, num_prefix_tokens)
    nearest = jnp.asarray(stay)[_argmax_patch(similarity, num_prefix_tokens)]
    owner = jnp.where(selection.mask, places[None], nearest[:, number])
    slot = jnp.take_along_axis(selection.slot, owner, axis=1)
    return selection._replace(slot=slot), scores


def weigh_redundancy(
    scores: Scores, features: Float[Array, "b n f"], weight: float, num_prefix_tokens: int
) -> Scores:
    """Scores that are low for tokens of little attention, and for those that a more attended token resembles.

    scores  [b n], predicted attention; `features` are compared by cosine; `weight` in [0, 1] is redundancy's share.
    Both count by rank in their example, so that neither's scale matters. A token is safe to bypass when a selected
    one resembles it; to look among the more attended alone keeps two alike from both leaving.
    """
    scores = jax.lax.stop_gradient(scores)

    def rank(x):
        return jnp.argsort(jnp.argsort(x, axis=1), axis=1)

    place = rank(-scores)  # 0 for the most attended; of two alike the first comes first
    more = place[:, None, :] < place[:, :, None]
    prefix = jnp.arange(scores.shape[1]) < num_prefix_tokens
    similarity = jnp.where(more & ~prefix[None, None], cosines(features, features), -1.0)
    redundancy = similarity.max(axis=-1)
    return -((1 - weight) * place + weight * rank(redundancy)).astype(jnp.float32)


def least_after_matching(num_tokens: int, num_prefix_tokens: int) -> int:
    """The fewest tokens that `bipartite_matching` can leave: one candidate at least needs a representative."""
    candidates = (num_tokens - num_prefix_tokens + 1) // 2
    return num_tokens - (candidates if num_tokens - num_prefix_tokens > 1 else 0)


def _argmax_patch(similarity: Float[Array, "b n m"], num_prefix_tokens: int) -> Int32[Array, "b n"]:
    patches = similarity[:, :, num_prefix_tokens:]
    return (jnp.argmax(patches, axis=-1) + num_prefix_tokens).astype(jnp.int32)
