"""ATS, Adaptive Token Sampling (Fayyaz et al. 2022, arXiv 2111.15667), at a fixed number of tokens.

A patch's score is the class token's attention to it times the length of its value. Scores, sorted and added up, are a
distribution, which is sampled at equal distances: where many patches have low scores, one stands for several. Only the
sampled tokens are queries; all are keys. In the paper samples that meet in one patch leave fewer tokens, another number
in each image. Here the number is fixed: the patches with the highest scores that were not sampled take those places.
For dense prediction, patches that were not sampled come back as they were.
"""

import jax
import jax.numpy as jnp

from tosa_jax.models.layers import Block
from tosa_jax.models.method import Method, at_layers
from tosa_jax.models.methods.reducing import PersistentReduction, class_scores
from tosa_jax.models.token_state import LayerContext, TokenState, key_bias
from tosa_jax.ops.array_types import Scores
from tosa_jax.ops.reduction import Reduction
from tosa_jax.ops.token_selection import Selection, gather_tokens, select_tokens, with_one_hot


class ATS(PersistentReduction):
    """Samples the share `keep_rate` of the patches that reach the layer."""

    reads_class_token = True
    proportional = False

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        if not self.spec.opens or context.read is not None:
            return super().apply(block, state, context)
        context = context.weighing(None, state.mask)
        bias = key_bias(None, state.mask)

        def attend(query, key, value):
            scores = class_scores(query, key, value, bias)
            chosen = sample(scores, self.spec.count, self.num_prefix_tokens)
            if self.one_hot:
                chosen = with_one_hot(chosen, query.dtype)
            b, n, h, dim = query.shape
            few = gather_tokens(query.reshape(b, n, -1), chosen).reshape(b, -1, h, dim)
            out, summary = context.attend(few, key, value)
            return out, (summary, chosen, scores)

        update, reported = block.attn_branch(state.tokens, attend, rotary=state.rotary)
        summary, chosen, scores = reported
        reduction = Reduction(chosen, before=state.tokens)
        left = state.reduced(reduction.merge(state.tokens), reduction, scores)
        tokens = block.finished(left.tokens, update, context.drop)
        return left.attended(tokens, summary, state.labels)

    def block_macs(self, block: Block) -> int:
        into, left = self.spec.count_in, self.spec.count
        # Of tokens that are not sampled: it is not known before.
        queries = (into - left) * block.width**2
        return block.attn_macs(left, into) + queries + block.mlp_macs(left)

    def own_macs(self, block: Block) -> int:
        """The class token's row once more."""
        return self.spec.count_in * block.width if self.spec.opens else 0


def sample(scores: Scores, count: int, num_prefix_tokens: int) -> Selection:
    """The prefix and `count - prefix` patches, sampled from the distribution of their `scores` [b n].

    The distribution runs from 0 at the lowest score to 1 at the highest; samples lie at equal distances from its first
    value above 0 to 1, and each takes the patch whose value is nearest.
    """
    patches = scores[:, num_prefix_tokens:]
    wanted, number = count - num_prefix_tokens, patches.shape[1]
    rank = jnp.argsort(jnp.argsort(patches, axis=1), axis=1)
    added = jnp.cumsum(jnp.sort(patches / patches.sum(axis=1, keepdims=True), axis=1), axis=1)
    added = (added - added[:, :1]) / jnp.maximum(added[:, -1:] - added[:, :1], 1e-12)
    start = jnp.where(added > 0, added, jnp.inf).min(axis=1, keepdims=True)
    start = jnp.where(jnp.isfinite(start), start, 0)
    points = start + (1 - start) * jnp.linspace(0.0, 1.0, wanted)[None]
    nearest = jnp.abs(points[:, :, None] - added[:, None]).argmin(axis=2)
    hit = jax.nn.one_hot(nearest, number).max(axis=1)
    # Sampled patches come first, then those of high rank.
    order = number * jnp.take_along_axis(hit, rank, axis=1) + rank
    prefix = jnp.zeros((scores.shape[0], num_prefix_tokens))
    return select_tokens(jnp.concatenate([prefix, order], axis=1), count, num_prefix_tokens)


def from_a_quarter_on(plan: str, depth: int) -> tuple[str, ...]:
    """A `whole_plan`: all layers after a quarter of the depth, 3 to 11 of twelve."""
    return at_layers(plan, depth, range(max(depth // 4, 1), depth))


METHODS = (
    Method(
        name="ats",
        kind=ATS,
        label="ATS, fixed counts",
        short_label="ATS",
        colours=("#a3475b", "#eb9aab"),
        whole_plan=from_a_quarter_on,
        equal_gmacs=True,
        fields={"budget": "uniform", "scan_layers": False},
    ),
)
