"""ToSA, Token Selective Attention (arXiv 2406.08816): a selector reads the attention logits of one layer, predicts the
next layer's map, and the tokens that the prediction pays most attention to go through that next layer.

The others bypass it, attention and MLP, unchanged. Layers of the kind that follow each other share one choice:
one gather, their blocks, one scatter.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tosa_jax.array_types import Heads, Scores
from tosa_jax.losses import map_kl
from tosa_jax.models.layers import Attend, Block
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.selector import TokenSelector
from tosa_jax.models.stream import LayerCall, Stream
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.token_ops import (
    attention_logits,
    column_sums,
    gather_tokens,
    num_selected,
    overlap,
    pool_heads,
    scatter_tokens,
    select_tokens,
    walk_map,
)


class SelectiveLayer(Standard):
    """Runs the block on the tokens of highest score. A method says where scores come from: `needs`, `scores`."""

    selects = True

    def __init__(self, config: ViTConfig, layer: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, layer, rngs=rngs)
        self.opens, self.closes = config.group(layer)
        self.num_prefix_tokens = config.num_prefix_tokens
        self.keep_rate = keep_rate_at(config, layer)
        self.head_pool, self.map_chunk = config.head_pool, config.map_chunk or None

    def scores(self, stream: Stream, call: LayerCall) -> Scores:
        """Importance [b n] of each token, higher is better; read only where a group opens."""
        return stream.summary

    def num_tokens(self, n: int) -> int:
        return num_selected(n - self.num_prefix_tokens, self.num_prefix_tokens, self.keep_rate)

    def apply(self, block: Block, stream: Stream, call: LayerCall) -> Stream:
        if self.opens:
            count = self.num_tokens(stream.tokens.shape[1])
            scores = self.scores(stream, call)
            chosen = select_tokens(scores, count, self.num_prefix_tokens)
            stream = stream._replace(
                tokens=gather_tokens(stream.tokens, chosen),
                bypassed=stream.tokens,
                selection=chosen,
                selected=(*stream.selected, chosen.indices),
                scores=(*stream.scores, scores),
            )
        stream = super().apply(block, stream, call)
        return self.restore(stream) if self.closes else stream

    def restore(self, stream: Stream) -> Stream:
        if stream.selection is None:
            return stream
        tokens = scatter_tokens(stream.bypassed, stream.tokens, stream.selection)
        return stream._replace(tokens=tokens, bypassed=None, selection=None)


def keep_rate_at(config: ViTConfig, layer: int) -> float:
    """The share of patches that the group of `layer` selects."""
    rates = config.keep_rates_given
    groups = [i for i in range(config.depth) if config.plan[i] != "standard" and config.group(i)[0]]
    group = sum(first <= layer for first in groups) - 1
    return rates[group] if len(rates) > 1 else rates[0]


class Selective(SelectiveLayer):
    """The paper's token-selective layer: scores are the column sums of the predicted map."""

    fit_kind = "selective_fit"

    def __init__(self, config: ViTConfig, layer: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, layer, rngs=rngs)
        self.selector = TokenSelector(config) if self.opens else None

    def needs(self) -> Attend | None:
        return self._predict if self.opens else None

    def _predict(self, query: Heads, key: Heads, value: Heads) -> tuple[Heads, Scores]:
        """Attention of the layer before, and the scores [b n] of the map it lets the selector predict."""

        def summarise(logits, attn_map, rows):
            # The exponential comes before the sum: a sum of log-probabilities is no importance.
            return column_sums(jnp.exp(self.selector(logits)))

        out, sums = walk_map(query, key, value, summarise, chunk=self.map_chunk)
        return out, pool_heads(sums, self.head_pool)

    def macs(self, block: Block, n: int) -> int:
        return super().macs(block, n) + (self.selector.macs(n) if self.opens else 0)


class SelectiveFit(Selective):
    """Stands in for `Selective` while selectors are trained: dense, and compares prediction and true map.

    The layer before hands over its queries and keys, which are linear in the number of tokens; its logits are computed
    again a chunk at a time beside this layer's own. Reports, an example each, `selector/kl/<layer>`, the share of the
    true top tokens that the selector finds (`selector/recall/<layer>`), and the share that the layer before
    would have found by its own column sums (`previous/recall/<layer>`).
    """

    def num_tokens(self, n: int) -> int:
        return n

    def needs(self) -> Attend | None:
        return self._hand_over if self.opens else None

    def _hand_over(self, query: Heads, key: Heads, value: Heads) -> tuple[Heads, Any]:
        out, _ = walk_map(query, key, value, lambda *_: None, chunk=self.map_chunk)
        return out, jax.lax.stop_gradient((query, key))

    def apply(self, block: Block, stream: Stream, call: LayerCall) -> Stream:
        if not self.opens:
            return Standard.apply(self, block, stream, call)
        before = stream.summary

        def attend(query, key, value):
            out, sums = self._compare(query, key, value, before)
            # What the next layer needs is reported by the attention it asked for.
            return out, (call.attend(query, key, value)[1], sums)

        tokens, (summary, sums) = call._replace(attend=attend).run(block, stream.tokens)
        n = tokens.shape[1]
        scores = {name: pool_heads(sums[name], self.head_pool) for name in ("true", "found", "own")}
        count = SelectiveLayer.num_tokens(self, n)

        def recall(name):
            return overlap(scores[name], scores["true"], count, self.num_prefix_tokens)

        aux = {
            f"selector/kl/{self.layer}": sums["kl"] / n,
            f"selector/recall/{self.layer}": recall("found"),
            f"previous/recall/{self.layer}": recall("own"),
        }
        return stream._replace(tokens=tokens, summary=summary, aux=stream.aux | aux)

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
