"""Oracle: tokens selected by how wrong their bypass would be; and a linear prediction of that error.

An oracle runs the layer on all tokens to learn what a method would have to predict. Its GMACs leave that run out: they
are those of a method that predicts perfectly at no cost. It saves no time. It shows how much accuracy a better
prediction could bring.
"""

import jax.numpy as jnp
from flax import nnx

from tosa_jax.models.bypass import BypassOptions
from tosa_jax.models.layers import Block, linear
from tosa_jax.models.method import Method
from tosa_jax.models.methods.selective import SelectiveLayer
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import Scores, Tokens
from tosa_jax.ops.token_selection import select_tokens


class WorstBypass(SelectiveLayer):
    """Oracle: the tokens that the bypass leaves farthest from where the layer, run densely, would have moved them.

    With `bypass="identity"` these are the tokens of the largest updates. Not for "shared", whose estimate depends on
    the choice itself, nor for groups of several layers, whose later updates the first one does not know.
    """

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        name = config.plan[spec.layer]
        kind = f"the layer kind {name!r}"
        bypass = config.options_of(BypassOptions).bypass
        check(bypass in ("", "identity", "low_rank"),
              f"bypass={bypass!r}: {kind} works with 'identity' and 'low_rank'")  # fmt: skip
        check(spec.opens and spec.closes,
              f"plan has layer {spec.layer} in a group: {kind} needs a standard layer before each")  # fmt: skip
        super().__init__(config, spec, rngs=rngs)

    def missed(self, block: Block, tokens: Tokens, moved: Tokens) -> Scores:
        """How far [b n] the bypass alone leaves tokens [b n d] from `moved`, where the layer takes them."""
        # Every patch bypassed: only the prefix is selected.
        prefix = self.num_prefix_tokens
        nothing = select_tokens(jnp.zeros(tokens.shape[:2]), prefix, prefix)
        assert self.bypass is not None  # the layer opens its group
        _, reduction = self.bypass.open(block, tokens, nothing)
        assert reduction.before is not None  # what bypassed tokens rejoin as
        return jnp.linalg.norm((moved - reduction.before).astype(jnp.float32), axis=-1)

    def expected(self, block: Block, tokens: Tokens) -> Scores:
        """What the choice is made by [b n]: here the truth, which takes the layer itself."""
        return self.missed(block, tokens, block(tokens)[0])

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        summary = self.expected(block, state.tokens)
        return super().apply(block, state._replace(summary=summary), context)


class PredictedBypass(WorstBypass):
    """The same choice without the layer: a linear map of the normalised tokens expects the logarithm of the miss.

    Chooses by position until `fit_bypass` has fitted that map, in closed form on unlabelled images.
    """

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.miss = linear(config, config.embed_dim, 1, rngs, kernel_init=zeros)

    def expected(self, block: Block, tokens: Tokens) -> Scores:
        """The expected logarithm of the miss [b n]."""
        return self.miss(block.norm1(tokens))[:, :, 0].astype(jnp.float32)

    def own_macs(self, block: Block) -> int:
        return super().own_macs(block) + self.num_tokens * self.width


METHODS = (
    Method(
        name="worst_bypass",
        kind=WorstBypass,
        label="oracle: what the bypass misses",
        colours=("#128a96", "#5cc4d0"),
        oracle=True,
    ),
    Method(
        name="predicted_bypass",
        kind=PredictedBypass,
        label="predicted: what the bypass misses",
        control=False,
    ),
)
