"""Layers that run on selected tokens only: the base class of ToSA and of every method that chooses tokens by a score.

All other tokens bypass the layer, its attention and its MLP. Neighbouring layers of one kind share one choice: tokens
are gathered once, go through all their blocks, and are scattered back once.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from tosa_jax.models.bypass import BYPASSES, BypassOptions
from tosa_jax.models.layers import Block
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.options import Options
from tosa_jax.models.token_state import LayerContext, LayerSpec, LinearFit, TokenState
from tosa_jax.models.vit_config import ViTConfig, check, check_choice
from tosa_jax.ops.array_types import Scores
from tosa_jax.ops.token_matching import weigh_redundancy
from tosa_jax.ops.token_selection import num_selected, select_tokens, with_one_hot


@dataclass(frozen=True, kw_only=True)
class SelectiveOptions(Options):
    """How scores become a choice. Raises ConfigError for values out of range.

    head_pool          how the scores of all heads become one: "mean" or "max".
    redundancy_weight  share in [0, 1] of redundancy in the scores: how much a token resembles a more attended one.
    """

    head_pool: str = "mean"
    redundancy_weight: float = 0.0

    def __post_init__(self) -> None:
        check_choice("head_pool", self.head_pool, ("mean", "max"))
        check(0 <= self.redundancy_weight <= 1,
              f"redundancy_weight={self.redundancy_weight} is not in [0, 1]")  # fmt: skip


class SelectiveLayer(Standard):
    """Runs the block on the tokens with the highest scores.

    A subclass says where scores come from: from the attention of the layer before (`needs`), or from the tokens
    (`scores`). `default_bypass` is the bypass that it uses unless the configuration names one.
    """

    selects = True
    options = (BypassOptions, SelectiveOptions)
    default_bypass = "identity"

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        self.num_prefix_tokens = config.num_prefix_tokens
        bypass, options = config.options_of(BypassOptions), config.options_of(SelectiveOptions)
        self.head_pool, self.map_chunk = options.head_pool, config.map_chunk or None
        path = BYPASSES[bypass.bypass or self.default_bypass]
        self.bypass = path(config, spec, rngs=rngs) if spec.opens else None
        self.proportional = bypass.bypass_size_bias
        self.redundancy_weight = options.redundancy_weight
        self.one_hot = config.gather == "one_hot"
        self.num_tokens, self.width = spec.count_group, config.embed_dim

    @classmethod
    def counted(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float | None) -> LayerSpec:
        """All layers of a group run on the tokens that its first one selects; all tokens rejoin after its last one."""
        count = spec.count_in
        if keep_rate is not None:
            wanted = num_selected(
                config.num_patches, config.num_prefix_tokens, keep_rate, config.count_multiple
            )
            count = min(wanted, count)
        return spec._replace(count=count, count_out=spec.count_group if spec.closes else count)

    def scores(self, state: TokenState, context: LayerContext) -> Scores:
        """The scores [b n] of the tokens, higher is better; called only for the first layer of a group."""
        return state.summary

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        if self.bypass is not None:
            scores = state.past_padding(self.scores(state, context), -jnp.inf)
            if weight := self.redundancy_weight:
                scores = weigh_redundancy(scores, state.tokens, weight, self.num_prefix_tokens)
            chosen = select_tokens(scores, self.spec.count, self.num_prefix_tokens)
            chosen = self.bypass.match(state.tokens, chosen)
            if self.one_hot:
                chosen = with_one_hot(chosen, state.tokens.dtype)
            entered = self.bypass.open(block, state.tokens, chosen, state.counts)
            state = state.opened(*entered, state.past_padding(scores, 0.0))
        state = super().apply(block, state, context)
        return state.restored() if self.spec.closes else state

    def linear_fits(self) -> tuple[LinearFit, ...]:
        return () if self.bypass is None else self.bypass.linear_fits()

    def own_macs(self, block: Block) -> int:
        if self.bypass is None:
            return 0
        weighing = self.num_tokens**2 * self.width if self.redundancy_weight else 0
        return self.bypass.macs(self.spec) + weighing
