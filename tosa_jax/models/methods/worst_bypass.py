"""Tokens selected by the error that their bypass would make: an oracle that knows it, and a method that predicts it.

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
from tosa_jax.models.token_state import LayerContext, LayerSpec, LinearFit, TokenState
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import Scores, Tokens
from tosa_jax.ops.token_selection import select_tokens


class WorstBypass(SelectiveLayer):
    """Oracle: selects the tokens that a bypass would leave farthest from where the layer, run densely, moves them.

    With `bypass="identity"` these are the tokens with the largest updates. Raises ConfigError with "shared", whose
    estimate depends on the choice itself, and in groups of several layers: the first one does not know the later
    updates.
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
        """The error of the bypass, float32 [b n]: the distance between bypassed tokens and `moved`.

        tokens  [b n d] before the layer; `moved` [b n d] after it, run densely.
        """
        # Every patch bypassed: only the prefix is selected.
        prefix = self.num_prefix_tokens
        nothing = select_tokens(jnp.zeros(tokens.shape[:2]), prefix, prefix)
        assert self.bypass is not None  # the layer opens its group
        _, reduction = self.bypass.open(block, tokens, nothing)
        assert reduction.before is not None  # what bypassed tokens rejoin as
        return jnp.linalg.norm((moved - reduction.before).astype(jnp.float32), axis=-1)

    def expected(self, block: Block, state: TokenState) -> Scores:
        """The scores [b n]: here the true error, for which the layer runs densely."""
        moved, _ = block(state.tokens, rotary=state.rotary)
        return self.missed(block, state.tokens, moved)

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        summary = self.expected(block, state)
        return super().apply(block, state._replace(summary=summary), context)


class PredictedBypass(WorstBypass):
    """The same choice by a prediction: a linear map of the normalised tokens gives the logarithm of the error.

    `fit_bypass` fits that map in closed form on unlabelled images. Before that it is zero, and the first patches are
    selected.
    """

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.miss = linear(config, config.embed_dim, 1, rngs, kernel_init=zeros)

    def expected(self, block: Block, state: TokenState) -> Scores:
        """The predicted logarithm of the error, float32 [b n]."""
        return self.miss(block.norm1(state.tokens))[:, :, 0].astype(jnp.float32)

    def linear_fits(self) -> tuple[LinearFit, ...]:
        """Those of the bypass, then the map to the logarithm of what that bypass leaves."""

        def target(block, before, after):
            missed = self.missed(block, before, after)
            return jnp.log(jnp.maximum(missed, jnp.finfo(jnp.float32).tiny))[:, :, None]

        def params(down, up, bias):
            return {"miss/kernel": down @ up, "miss/bias": bias}

        return (*super().linear_fits(), LinearFit(1, target, params))

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
