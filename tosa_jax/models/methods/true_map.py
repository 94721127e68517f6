"""Oracle: tokens selected by the true attention map that a selector tries to predict.

An oracle runs the layer on all tokens to learn what a method would have to predict. Its GMACs leave that run out: they
are those of a method that predicts perfectly at no cost. It saves no time. It shows how much accuracy a better
prediction could bring.
"""

from tosa_jax.models.layers import AttentionFn, Block
from tosa_jax.models.method import Method
from tosa_jax.models.methods.previous import Previous
from tosa_jax.models.token_state import LayerContext, TokenState


class TrueMap(Previous):
    """Oracle: selects by the column sums of the layer's own map over all tokens, which a selector has to predict.

    In a group of layers it is the map of the first one.
    """

    def needs(self) -> AttentionFn | None:
        return None

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        if self.spec.opens:
            _, sums = block.attn_branch(state.tokens, self._sum_columns, rotary=state.rotary)
            state = state._replace(summary=sums)
        return super().apply(block, state, context)


METHODS = (
    Method(
        name="true_map",
        kind=TrueMap,
        label="oracle: the true next map",
        colours=("#9a7d0a", "#d8bd4a"),
        oracle=True,
    ),
)
