"""Reductions: how many tokens become fewer, and how all of them come back.

Selected, merged and clustered tokens have the same form here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tosa_jax.ops.array_types import Indices, Present, Scores, Tokens
from tosa_jax.ops.rotary import Rotary
from tosa_jax.ops.token_matching import spread_groups, sum_groups
from tosa_jax.ops.token_selection import Selection, gather_tokens, scatter_tokens, take


class TokenWeights(NamedTuple):
    """Weights for new tokens that are weighted means of old ones.

    weights  [b s n]: share of each old token in a new one; rows of means sum to 1.
    back     [b n s]: share of each new token in a restored old one; None: `weights` transposed, with rows divided by
             their sums.
    """

    weights: Float[Array, "b s n"]
    back: Float[Array, "b n s"] | None = None


class Reduction(NamedTuple):
    """How n old tokens became s new ones.

    source   a `Selection`: the old tokens that are kept; or `TokenWeights`: how old tokens are mixed.
    weights  [b n]: weight of each old token in the mean of its group, which a selected token becomes; 0 for tokens that
             are dropped. None: selected tokens stay as they are. Not read with `TokenWeights`.
    totals   [b s]: the sum of `weights` over each group; None: `sizes`.
    sizes    [b s]: how many old tokens each new one represents, itself included; None: one.
    mask     [b s]: false for new tokens that no attention may read; None: all are read.
    before   [b n d]: the old tokens into which the new ones are put back; bypassed tokens keep these values. None: each
             old token becomes a copy of the new token that represents it.
    entered  [b s d]: the new tokens before the layer. If given, each old token gets the update (after - before) of the
             new token that represents it. Needs `before`.
    rotary   rotary positions of the new tokens; None: there are none. `TokenState` sets it.
    labels   [b n 1]: labels of the old tokens; None: tokens have none. `TokenState` sets it.
    """

    source: Selection | TokenWeights
    weights: Float[Array, "b n"] | None = None
    totals: Float[Array, "b s"] | None = None
    sizes: Float[Array, "b s"] | None = None
    mask: Bool[Array, "b s"] | None = None
    before: Tokens | None = None
    entered: Float[Array, "b s d"] | None = None
    rotary: Rotary | None = None
    labels: Float[Array, "b n 1"] | None = None

    def merge(self, values: Tokens) -> Float[Array, "b s d"]:
        """values [b n d] of the old tokens -> those of the new ones [b s d]."""
        if isinstance(self.source, TokenWeights):
            weights = self.source.weights.astype(values.dtype)
            return jnp.einsum("bsn,bnd->bsd", weights, values, precision="highest")
        totals = self.sizes if self.totals is None else self.totals
        if self.weights is None or totals is None:
            return gather_tokens(values, self.source)
        total = sum_groups(values * self.weights[:, :, None].astype(values.dtype), self.source)
        # One division a group, not one a channel.
        return (total.astype(jnp.float32) * (1 / totals)[:, :, None]).astype(values.dtype)

    def representatives(self) -> Indices:
        """The old token that represents each new one: the selected token, or the one with the largest weight."""
        if isinstance(self.source, Selection):
            return self.source.indices
        return self.source.weights.argmax(axis=2).astype(jnp.int32)

    def scores_before(self, scores: Float[Array, "b s"]) -> Scores:
        """Scores [b s] of the new tokens -> [b n], those of the old ones that represent them; 0 for all others."""
        if isinstance(self.source, Selection):
            seen = jnp.take_along_axis(scores, self.source.slot, axis=1)
            return jnp.where(self.source.mask, seen, 0)
        count = self.source.weights.shape[2]
        hot = jax.nn.one_hot(self.representatives(), count, dtype=scores.dtype)
        return jnp.einsum("bsn,bs->bn", hot, scores, precision="highest")

    def places(self, rotary: Rotary) -> Rotary:
        """Rotary positions of the old tokens -> those of the new ones.

        A selected token keeps its own place. A mean of tokens has the means of their cosines and of their sines: then
        a query pays it what it pays its tokens on average, were they alike in all but their places. It is nearer to
        the dense network than the place of one token, or the mean place (results/rotary_choices.json).
        """
        source = self.source
        examples = (source.indices if isinstance(source, Selection) else source.weights).shape[0]
        both = jnp.concatenate([rotary.cos, rotary.sin], axis=2)
        both = jnp.broadcast_to(both, (examples, *both.shape[1:]))
        # A merge may be a sum, as EViT's fused token is.
        merged, total = self.merge(both), self.merge(jnp.ones((*both.shape[:2], 1)))
        return Rotary(*jnp.split(merged / jnp.maximum(total, 1e-6), 2, axis=2))

    def present(self, before: Present) -> Bool[Array, "b s"]:
        """Which of the new tokens are there, by which of the old ones are (the others are padding).

        A mean is there if a token of its group is.
        """
        if isinstance(self.source, Selection) and self.weights is not None:
            return group_totals(before.astype(jnp.float32), self.source) > 0
        return take(before.astype(jnp.int32), self.representatives()) > 0

    def spread(self, values: Float[Array, "b s d"]) -> Tokens:
        """values [b s d] of the new tokens -> [b n d]: each old token gets those of the new one that represents it."""
        if isinstance(self.source, Selection):
            return spread_groups(values, self.source)
        back = self.source.back
        if back is None:
            back = self.source.weights.transpose(0, 2, 1)
            back = back / jnp.maximum(back.sum(axis=2, keepdims=True), 1e-12)
        return jnp.einsum("bns,bsd->bnd", back.astype(values.dtype), values, precision="highest")

    def restore(self, tokens: Float[Array, "b s d"]) -> Tokens:
        """All old tokens [b n d], after the new ones became `tokens` [b s d].

        Raises ValueError: `before` without `entered`, and a source that is no selection.
        """
        if self.before is None:
            return self.spread(tokens)
        if self.entered is not None:
            return self.before + self.spread(tokens - self.entered)
        if isinstance(self.source, TokenWeights):
            raise ValueError(
                "weighted means rejoin by copies or by updates: leave `before`, or give `entered`"
            )
        return scatter_tokens(self.before, tokens, self.source)

    def restore_labels(self, labels: Float[Array, "b s 1"]) -> Float[Array, "b n 1"]:
        """Labels of the old tokens, after those of the new ones became `labels`.

        A token that was bypassed keeps its own label, whatever updates it gets; one that is a copy of a new token gets
        that token's.
        """
        if self.before is None or isinstance(self.source, TokenWeights):
            return self.spread(labels)
        assert self.labels is not None  # the new tokens' labels were made of them
        return scatter_tokens(self.labels, labels, self.source)


def pooled(selection: Selection, weights: Float[Array, "b n"]) -> Reduction:
    """A reduction whose selected tokens become the means of their groups; `weights` [b n] of the old tokens.

    A weight is 0 for padding alone. The mean of padding alone is 0.
    """
    sizes = jnp.maximum(group_totals(weights, selection), 1e-12)
    return Reduction(selection, weights, sizes=sizes)


def group_totals(weights: Float[Array, "b n"], selection: Selection) -> Float[Array, "b s"]:
    """The sum of `weights` [b n] over each group [b s]."""
    return sum_groups(weights[:, :, None], selection)[:, :, 0]


def beside_prefix(weights: Float[Array, "b s n"], num_prefix_tokens: int) -> Float[Array, "b t m"]:
    """Weights [b s n] among patches, with prefix tokens before them that stay as they are."""
    first = num_prefix_tokens
    whole = jnp.pad(weights, ((0, 0), (first, 0), (first, 0)))
    own = jnp.eye(whole.shape[1], whole.shape[2]) * (jnp.arange(whole.shape[1]) < first)[:, None]
    return whole + own[None]
