"""PSViT, Pooling and Sharing (Chen et al. 2021, arXiv 2108.03428): tokens are pooled, and layers share their maps.

The published network was found by a search, and there is no code. What is known is its two moves: token pooling, which
shrinks the tokens in space from stage to stage, and attention sharing, where a layer uses the map of the one before it
and computes no queries and keys. The rest is this project's choice: "psvit" pools the grid by means (adaptive average
pooling) to about the share `keep_rate` of the places that reach it, and hands its map on; "psvit_share" uses that map.
For dense prediction, each patch gets a copy of its cell, or the mean where cells overlap.
"""

import jax.numpy as jnp
from flax import nnx

from tosa_jax.models.layers import Block
from tosa_jax.models.method import Method
from tosa_jax.models.methods.reducing import PersistentReduction, own_map, run_by_map
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState
from tosa_jax.models.vit_config import STANDARD, ViTConfig, check
from tosa_jax.ops.clustering import as_grid, coarser, pooling
from tosa_jax.ops.reduction import Reduction, TokenWeights, beside_prefix


class PSViT(PersistentReduction):
    """Pools the grid before the layer, and hands the layer's attention map on."""

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        prefix = config.num_prefix_tokens
        self.before, self.after = (
            as_grid(count - prefix, config.grid) for count in (spec.count_in, spec.count)
        )

    @classmethod
    def counted(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float | None) -> LayerSpec:
        """As the base class. Raises ConfigError also after a method that leaves no grid."""
        name = config.plan[spec.layer]
        others = set(config.plan[: spec.layer]) - {STANDARD, name, f"{name}_share"}
        check(
            not others,
            f"{name!r} pools a grid, and {min(others, default='')!r} before it may leave none",
        )
        return super().counted(config, spec, keep_rate)

    @classmethod
    def count_left(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float) -> int:
        prefix = config.num_prefix_tokens
        rows, columns = coarser(as_grid(spec.count_in - prefix, config.grid), keep_rate)
        return prefix + rows * columns

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        if self.spec.opens:
            weights = jnp.asarray(pooling(self.before, self.after))[None]
            weights = jnp.broadcast_to(weights, (state.tokens.shape[0], *weights.shape[1:]))
            reduction = Reduction(TokenWeights(beside_prefix(weights, self.num_prefix_tokens)))
            state = state.reduced(reduction.merge(state.tokens), reduction)
        attn_map = own_map(block, state)
        return run_by_map(attn_map, block, state._replace(attention_map=attn_map), context)


class PSViTShare(Standard):
    """Attends by the map of the layer before, on the same tokens, to values of its own."""

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        return run_by_map(state.shared_map, block, state, context)

    def block_macs(self, block: Block) -> int:
        """Without queries, keys, and their products."""
        n, d = self.spec.count, block.width
        return 2 * n * d**2 + n**2 * d + block.mlp_macs(n)


def in_pairs(plan: str, depth: int) -> tuple[str, ...]:
    """A `whole_plan`: layers that pool and layers that share, in turn."""
    return tuple(plan if i % 2 == 0 else f"{plan}_share" for i in range(depth))


METHODS = (
    Method(
        name="psvit",
        kind=PSViT,
        label="PSViT",
        colours=("#7d7a1c", "#cfcb62"),
        whole_plan=in_pairs,
        equal_gmacs=True,
        fields={"budget": "uniform", "scan_layers": False},
    ),
    Method(
        name="psvit_share",
        kind=PSViTShare,
        label="PSViT, a layer that shares a map",
        control=False,
        has_budget=False,
    ),
)
