"""ToSA, Token Selective Attention (arXiv 2406.08816): a selector reads the attention logits of one layer, predicts the
next layer's map, and the tokens that the prediction pays most attention to go through that next layer.

The others bypass it, attention and MLP, unchanged. Layers of the kind that follow each other share one choice:
one gather, their blocks, one scatter.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tosa_jax.models.bypass import BYPASSES
from tosa_jax.models.layers import AttentionFn, Block
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.selector import TokenSelector
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.ops.array_types import Heads, Scores
from tosa_jax.ops.attention import (
    attention,
    attention_logits,
    column_sums,
    map_kl,
    pool_heads,
    walk_map,
)
from tosa_jax.ops.token_matching import weigh_redundancy
from tosa_jax.ops.token_selection import overlap, select_tokens, with_one_hot


class SelectiveLayer(Standard):
    """Runs the block on the tokens of highest score. A method says where scores come from: `needs`, `scores`."""

    selects = True
    default_bypass = "identity"

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        self.num_prefix_tokens = config.num_prefix_tokens
        self.head_pool, self.map_chunk = config.head_pool, config.map_chunk or None
        path = BYPASSES[config.bypass or self.default_bypass]
        self.bypass = path(config, spec, rngs=rngs) if spec.opens else None
        self.size_bias, self.redundancy_weight = config.bypass_size_bias, config.redundancy_weight
        self.one_hot = config.gather == "one_hot"
        self.num_tokens, self.width = config.num_tokens, config.embed_dim

    def scores(self, state: TokenState, context: LayerContext) -> Scores:
        """Importance [b n] of each token, higher is better; read only where a group opens."""
        return state.summary

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        if self.spec.opens:
            scores = self.scores(state, context)
            if weight := self.redundancy_weight:
                scores = weigh_redundancy(scores, state.tokens, weight, self.num_prefix_tokens)
            chosen = select_tokens(scores, self.spec.count, self.num_prefix_tokens)
            if self.bypass.needs_representatives:
                chosen = self.bypass.match(state.tokens, chosen)
            if self.one_hot:
                chosen = with_one_hot(chosen, state.tokens.dtype)
            state = state.opened(*self.bypass.open(block, state.tokens, chosen), scores)
        state = super().apply(block, state, self.weighing_sizes(state, context))
        return state.restored() if self.spec.closes else state

    def weighing_sizes(self, state: TokenState, context: LayerContext) -> LayerContext:
        """The call with an attention in which a token counts as often as it stands for others."""
        if state.sizes is None or not self.size_bias:
            return context
        bias = jnp.log(state.sizes)
        # Inside a group nobody reads a map: the next layer has its tokens already, or is a standard one.
        return context._replace(attention_fn=lambda q, k, v: (attention(q, k, v, bias), None))

    def own_macs(self, block: Block) -> int:
        if not self.spec.opens:
            return 0
        weighing = self.num_tokens**2 * self.width if self.redundancy_weight else 0
        return self.bypass.macs(self.spec) + weighing


class Selective(SelectiveLayer):
    """The paper's token-selective layer: scores are the column sums of the predicted map."""

    fit_kind = "selective_fit"

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        self.selector = TokenSelector(config) if spec.opens else None

    def needs(self) -> AttentionFn | None:
        return self._predict if self.spec.opens else None

    def _predict(self, query: Heads, key: Heads, value: Heads) -> tuple[Heads, Scores]:
        """Attention of the layer before, and the scores [b n] of the map it lets the selector predict."""

        def summarise(logits, attn_map, rows):
            # The exponential comes before the sum: a sum of log-probabilities is no importance.
            return column_sums(jnp.exp(self.selector(logits)))

        out, sums = walk_map(query, key, value, summarise, chunk=self.map_chunk)
        return out, pool_heads(sums, self.head_pool)

    def own_macs(self, block: Block) -> int:
        predicting = self.selector.macs(self.num_tokens) if self.spec.opens else 0
        return super().own_macs(block) + predicting


class SelectiveFit(Selective):
    """Stands in for `Selective` while selectors are trained: dense, and compares prediction and true map.

    The layer before hands over its queries and keys, which are linear in the number of tokens; its logits are computed
    again a chunk at a time beside this layer's own. Reports, an example each, `selector/kl/<layer>`, the share of the
    true top tokens that the selector finds (`selector/recall/<layer>`), and the share that the layer before
    would have found by its own column sums (`previous/recall/<layer>`).
    """

    def block_macs(self, block: Block) -> int:
        return block.macs(self.num_tokens)

    def needs(self) -> AttentionFn | None:
        return self._hand_over if self.spec.opens else None

    def _hand_over(self, query: Heads, key: Heads, value: Heads) -> tuple[Heads, Any]:
        out, _ = walk_map(query, key, value, lambda *_: None, chunk=self.map_chunk)
        return out, jax.lax.stop_gradient((query, key))

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        if not self.spec.opens:
            return Standard.apply(self, block, state, context)
        before = state.summary

        def attend(query, key, value):
            out, sums = self._compare(query, key, value, before)
            # What the next layer needs is reported by the attention it asked for.
            return out, (context.attention_fn(query, key, value)[1], sums)

        tokens, (summary, sums) = context._replace(attention_fn=attend).run(block, state.tokens)
        n = tokens.shape[1]
        scores = {name: pool_heads(sums[name], self.head_pool) for name in ("true", "found", "own")}

        def recall(name):
            return overlap(scores[name], scores["true"], self.spec.count, self.num_prefix_tokens)

        aux = {
            f"selector/kl/{self.spec.layer}": sums["kl"] / n,
            f"selector/recall/{self.spec.layer}": recall("found"),
            f"previous/recall/{self.spec.layer}": recall("own"),
        }
        return state._replace(tokens=tokens, summary=summary, aux=state.aux | aux)

    def _compare(self, query, key, value, before):
        before_query, before_key = before

        def summarise(logits, attn_map, before_rows):
            own_logits = attention_logits(before_rows, before_key)
            found = self.selector(own_logits)
            logits, attn_map = jax.lax.stop_gradient((logits, attn_map))
            return {
                "kl": map_kl(logits, found),
                "true": column_sums(attn_map),
                "found": column_sums(jnp.exp(found)),
                "own": column_sums(jax.nn.softmax(own_logits, axis=-1)),
            }

        return walk_map(query, key, value, summarise, rows=before_query, chunk=self.map_chunk)
