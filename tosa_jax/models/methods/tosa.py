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
from tosa_jax.attention_ops import attention, attention_logits, column_sums, pool_heads, walk_map
from tosa_jax.losses import map_kl
from tosa_jax.models.bypass import BYPASSES
from tosa_jax.models.layers import Attend, Block
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.selector import TokenSelector
from tosa_jax.models.stream import LayerCall, Place, Stream
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.stand_ins import weigh_redundancy
from tosa_jax.token_ops import overlap, select_tokens, with_one_hot


class SelectiveLayer(Standard):
    """Runs the block on the tokens of highest score. A method says where scores come from: `needs`, `scores`."""

    selects = True
    default_bypass = "identity"

    def __init__(self, config: ViTConfig, place: Place, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, place, rngs=rngs)
        self.num_prefix_tokens = config.num_prefix_tokens
        self.head_pool, self.map_chunk = config.head_pool, config.map_chunk or None
        path = BYPASSES[config.bypass or self.default_bypass]
        self.bypass = path(config, place, rngs=rngs) if place.opens else None
        self.size_bias, self.redundancy_weight = config.bypass_size_bias, config.redundancy_weight
        self.one_hot = config.gather == "one_hot"
        self.num_tokens, self.width = config.num_tokens, config.embed_dim

    def scores(self, stream: Stream, call: LayerCall) -> Scores:
        """Importance [b n] of each token, higher is better; read only where a group opens."""
        return stream.summary

    def apply(self, block: Block, stream: Stream, call: LayerCall) -> Stream:
        if self.place.opens:
            scores = self.scores(stream, call)
            if weight := self.redundancy_weight:
                scores = weigh_redundancy(scores, stream.tokens, weight, self.num_prefix_tokens)
            chosen = select_tokens(scores, self.place.count, self.num_prefix_tokens)
            if self.bypass.needs_stand_ins:
                chosen = self.bypass.match(stream.tokens, chosen)
            if self.one_hot:
                chosen = with_one_hot(chosen, stream.tokens.dtype)
            stream = stream.opened(*self.bypass.open(block, stream.tokens, chosen), scores)
        stream = super().apply(block, stream, self.weighing_sizes(stream, call))
        return stream.restored() if self.place.closes else stream

    def weighing_sizes(self, stream: Stream, call: LayerCall) -> LayerCall:
        """The call with an attention in which a token counts as often as it stands for others."""
        if stream.sizes is None or not self.size_bias:
            return call
        bias = jnp.log(stream.sizes)
        # Inside a group nobody reads a map: the next layer has its tokens already, or is a standard one.
        return call._replace(attend=lambda q, k, v: (attention(q, k, v, bias), None))

    def own_macs(self, block: Block) -> int:
        if not self.place.opens:
            return 0
        weighing = self.num_tokens**2 * self.width if self.redundancy_weight else 0
        return self.bypass.macs(self.place) + weighing


class Selective(SelectiveLayer):
    """The paper's token-selective layer: scores are the column sums of the predicted map."""

    fit_kind = "selective_fit"

    def __init__(self, config: ViTConfig, place: Place, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, place, rngs=rngs)
        self.selector = TokenSelector(config) if place.opens else None

    def needs(self) -> Attend | None:
        return self._predict if self.place.opens else None

    def _predict(self, query: Heads, key: Heads, value: Heads) -> tuple[Heads, Scores]:
        """Attention of the layer before, and the scores [b n] of the map it lets the selector predict."""

        def summarise(logits, attn_map, rows):
            # The exponential comes before the sum: a sum of log-probabilities is no importance.
            return column_sums(jnp.exp(self.selector(logits)))

        out, sums = walk_map(query, key, value, summarise, chunk=self.map_chunk)
        return out, pool_heads(sums, self.head_pool)

    def own_macs(self, block: Block) -> int:
        predicting = self.selector.macs(self.num_tokens) if self.place.opens else 0
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

    def needs(self) -> Attend | None:
        return self._hand_over if self.place.opens else None

    def _hand_over(self, query: Heads, key: Heads, value: Heads) -> tuple[Heads, Any]:
        out, _ = walk_map(query, key, value, lambda *_: None, chunk=self.map_chunk)
        return out, jax.lax.stop_gradient((query, key))

    def apply(self, block: Block, stream: Stream, call: LayerCall) -> Stream:
        if not self.place.opens:
            return Standard.apply(self, block, stream, call)
        before = stream.summary

        def attend(query, key, value):
            out, sums = self._compare(query, key, value, before)
            # What the next layer needs is reported by the attention it asked for.
            return out, (call.attend(query, key, value)[1], sums)

        tokens, (summary, sums) = call._replace(attend=attend).run(block, stream.tokens)
        n = tokens.shape[1]
        scores = {name: pool_heads(sums[name], self.head_pool) for name in ("true", "found", "own")}

        def recall(name):
            return overlap(scores[name], scores["true"], self.place.count, self.num_prefix_tokens)

        aux = {
            f"selector/kl/{self.place.layer}": sums["kl"] / n,
            f"selector/recall/{self.place.layer}": recall("found"),
            f"previous/recall/{self.place.layer}": recall("own"),
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
