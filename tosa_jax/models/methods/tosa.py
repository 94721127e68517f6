"""ToSA, Token Selective Attention (Singh et al. 2024, arXiv 2406.08816).

A selector reads the attention logits of one layer and predicts the attention map of the next. The tokens that the
prediction pays most attention to go through that next layer; the others bypass it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tosa_jax.models.layers import AttentionFn, Bias, Block
from tosa_jax.models.method import MAIN, Method
from tosa_jax.models.methods.selective import SelectiveLayer
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.selector import SelectorOptions, TokenSelector
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.ops.array_types import Heads, Scores
from tosa_jax.ops.attention import (
    attention_logits,
    column_sums,
    map_kl,
    pool_heads,
    walk_map,
)
from tosa_jax.ops.token_selection import overlap


class Selective(SelectiveLayer):
    """The paper's token-selective layer: scores are the column sums of the predicted map."""

    options = (*SelectiveLayer.options, SelectorOptions)
    fit_modules = ("selector",)

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        self.selector = TokenSelector(config) if spec.opens else None

    def needs(self) -> AttentionFn | None:
        return self._predict if self.spec.opens else None

    def _predict(
        self, query: Heads, key: Heads, value: Heads, key_bias: Bias = None
    ) -> tuple[Heads, Scores]:
        """The attention of the layer before; it reports the scores [b n] from the map that the selector predicts."""
        selector = self.selector
        assert selector is not None  # only the first layer of a group asks for this, and it has one
        out, sums = selector.attention_and_sums(query, key, value, self.map_chunk, key_bias)
        return out, pool_heads(sums, self.head_pool)

    def own_macs(self, block: Block) -> int:
        return super().own_macs(block) + self.selector_macs()

    def selector_macs(self) -> int:
        return 0 if self.selector is None else self.selector.macs(self.num_tokens)


class SelectiveFit(Selective):
    """Takes the place of `Selective` while selectors are trained: runs densely and compares predicted and true map.

    The layer before hands over its queries and keys, whose size is linear in the number of tokens. Its logits are then
    computed again, a chunk of rows at a time, beside those of this layer.

    Reports for each example:

    selector/kl/<layer>       the Kullback-Leibler divergence of the predicted map from the true one, mean over rows.
    selector/recall/<layer>   share of the tokens with the highest true scores that the selector finds.
    previous/recall/<layer>   share of them that the column sums of the layer before would find.
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

        comparing = context._replace(attention_fn=attend)
        tokens, (summary, sums) = comparing.run(block, state.tokens, state.rotary)
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
        selector = self.selector
        assert selector is not None  # only the first layer of a group compares, and it has one
        place = jnp.arange(query.shape[1])
        # The rows that scores are summed over.
        read = jnp.where(place % selector.query_stride, 0, 1)

        def summarise(logits, attn_map, rows):
            before_rows, read = rows
            own_logits = attention_logits(before_rows, before_key)
            found = selector(own_logits)
            logits, attn_map = jax.lax.stop_gradient((logits, attn_map))
            return {
                "kl": map_kl(logits, found),
                "true": column_sums(attn_map),
                "found": column_sums(jnp.exp(found), read),
                "own": column_sums(jax.nn.softmax(own_logits, axis=-1)),
            }

        rows = before_query, jnp.broadcast_to(read, query.shape[:2])
        return walk_map(query, key, value, summarise, rows=rows, chunk=self.map_chunk)


METHODS = (
    Method(
        name=MAIN,
        kind=Selective,
        takes_padding=True,
        plan="selective",
        label="ToSA",
        colours=("#2463c4", "#6ea8ff"),
        control=False,
        fit_kind=SelectiveFit,
    ),
)
