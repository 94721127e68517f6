"""The controls that stand beside ToSA at the same budget: a claim for it counts only where they are worse."""

import jax

from tosa_jax.errors import ConfigError
from tosa_jax.models.layers import AttentionFn, Block, draw, fold_key
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.methods.tosa import SelectiveLayer
from tosa_jax.models.token_state import LayerContext, TokenState
from tosa_jax.ops.array_types import Heads, Scores
from tosa_jax.ops.attention import column_sums, pool_heads, walk_map


class Random(SelectiveLayer):
    """Selects patches at random, afresh at every call."""

    def scores(self, state: TokenState, context: LayerContext) -> Scores:
        """Uniform in [0, 1), [b n]. Raises ConfigError: the call has no key to draw them by."""
        if context.key is None:
            raise ConfigError(
                "the layer kind 'random' draws its tokens: call model(images, key=...)"
            )
        b, n, _ = state.tokens.shape
        return draw(fold_key(context.key, 2), b, lambda key: jax.random.uniform(key, (n,)))


class Previous(SelectiveLayer):
    """Selects by the column sums of the previous layer's own map: ToSA without a selector."""

    def needs(self) -> AttentionFn | None:
        return self._sum_columns if self.spec.opens else None

    def _sum_columns(self, query: Heads, key: Heads, value: Heads) -> tuple[Heads, Scores]:
        out, sums = walk_map(
            query, key, value, lambda _, attn_map, __: column_sums(attn_map), chunk=self.map_chunk
        )
        return out, pool_heads(sums, self.head_pool)


class Skip(Standard):
    """The layer removed: what is left when nothing is selected."""

    selects = True

    def block_macs(self, block: Block) -> int:
        return 0

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        return state
