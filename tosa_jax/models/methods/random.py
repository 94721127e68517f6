"""Control: tokens selected at random. A method that selects must be better than this at the same cost."""

import jax

from tosa_jax.models.layers import draw, fold_key
from tosa_jax.models.method import Method
from tosa_jax.models.methods.selective import SelectiveLayer
from tosa_jax.models.token_state import LayerContext, TokenState
from tosa_jax.ops.array_types import Scores


class Random(SelectiveLayer):
    """Selects patches at random, others at every call. Needs the network to be called with a key."""

    def scores(self, state: TokenState, context: LayerContext) -> Scores:
        """Uniform in [0, 1), float32 [b n]."""
        assert context.key is not None, "the row says that it needs a key"
        b, n, _ = state.tokens.shape
        return draw(fold_key(context.key, 2), b, lambda key: jax.random.uniform(key, (n,)))


METHODS = (
    Method(
        name="random",
        kind=Random,
        takes_padding=True,
        label="random selection",
        colours=("#d9730d", "#f2a154"),
        needs_key=True,
        free_choice=True,
    ),
)
