"""Selection by redundancy: a patch is bypassed where another one resembles it, whatever attention it gets.

Between a layer's two branches the keys of its own attention are compared, as in ToMe (Bolya et al. 2023, "Token
Merging: Your ViT But Faster"), and the most redundant patches leave: their representatives go on as the mean of both.
Layer by layer fewer tokens remain. Unlike merged tokens, bypassed ones keep what sets them apart from their
representative, and rejoin with it. No map is read, and nothing is fitted.
"""

from flax import nnx

from tosa_jax.models.layers import Block
from tosa_jax.models.methods.tosa import SelectiveLayer
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.token_matching import bipartite_matching, least_after_matching
from tosa_jax.ops.token_selection import with_one_hot


class Redundancy(SelectiveLayer):
    """Attention on the tokens that come in, MLP on those that stay; neighbours of the kind go on from there."""

    nests = True
    default_bypass = "shared"
    least_count = staticmethod(least_after_matching)

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        check(config.bypass in ("", "shared"),
              f"bypass={config.bypass!r}: the layer kind 'redundancy' works with 'shared' alone")  # fmt: skip
        super().__init__(config, spec, rngs=rngs)

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        context = self.weighing_sizes(state, context)

        def attend(query, key, value):
            out, summary = context.attention_fn(query, key, value)
            return out, (summary, key.mean(axis=2))

        update, (summary, keys) = block.attn_branch(state.tokens, attend)
        tokens = state.tokens + (context.drop(update, 0) if context.drop else update)
        if self.spec.opens:
            chosen, scores = bipartite_matching(keys, self.spec.count, self.num_prefix_tokens)
            if self.one_hot:
                chosen = with_one_hot(chosen, tokens.dtype)
            entered = self.bypass.open(block, tokens, chosen, state.sizes)
            state = state.opened(*entered, scores)
            tokens = state.tokens
        update = block.mlp_branch(tokens)
        tokens = tokens + (context.drop(update, 1) if context.drop else update)
        state = state._replace(tokens=tokens, summary=summary)
        return state.restored() if self.spec.closes else state

    def block_macs(self, block: Block) -> int:
        return block.attn_macs(self.spec.count_in) + block.mlp_macs(self.spec.count)

    def own_macs(self, block: Block) -> int:
        if not self.spec.opens:
            return 0
        into, left = self.spec.count_in, self.spec.count
        candidates = (into - self.num_prefix_tokens + 1) // 2
        matching = candidates * (into - candidates) * (block.width // block.attn.num_heads)
        return matching + (into - left) * left * block.width * self.bypass.pool
