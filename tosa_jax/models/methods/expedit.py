"""Expedit (Liang et al. 2022, arXiv 2210.01035): the later layers run on clusters, and all tokens are rebuilt.

After the first layers, patches are gathered into clusters on a coarser grid by a few rounds of soft k-means. The layers
that follow run on these. At their end each patch is rebuilt as a weighted sum of the clusters that were nearest to it
before. Nothing is trained.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from tosa_jax.models.layers import Block
from tosa_jax.models.method import Method, at_layers
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.options import Options
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import Tokens
from tosa_jax.ops.clustering import as_grid, coarser, reconstruction, soft_clusters
from tosa_jax.ops.reduction import Reduction, TokenWeights, beside_prefix


@dataclass(frozen=True, kw_only=True)
class ExpeditOptions(Options):
    """How patches are gathered and rebuilt. Raises ConfigError for values out of range.

    cluster_rounds       of k-means.
    cluster_window       odd: a patch may belong to clusters whose cell is in this window around its own.
    cluster_temperature  by which squared distances count, in gathering and in rebuilding. The length of the features
                         decides what is right: .02 for ViT-L of AugReg.
    cluster_neighbours   clusters from which a patch is rebuilt.
    """

    cluster_rounds: int = 5
    cluster_window: int = 5
    cluster_temperature: float = 0.02
    cluster_neighbours: int = 20

    def __post_init__(self) -> None:
        for name in ("cluster_rounds", "cluster_window", "cluster_neighbours"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(self.cluster_window % 2 == 1, f"cluster_window={self.cluster_window} must be odd")
        check(self.cluster_temperature > 0,
              f"cluster_temperature={self.cluster_temperature} must be above 0")  # fmt: skip


class Expedit(Standard):
    """Runs a group of layers on about the share `keep_rate` of the patches, as clusters."""

    selects = True
    options = (ExpeditOptions,)

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        self.choices = config.options_of(ExpeditOptions)
        self.num_prefix_tokens, self.grid = config.num_prefix_tokens, config.grid
        self.num_clusters = spec.count - config.num_prefix_tokens
        self.pooled = as_grid(self.num_clusters, config.grid)

    @classmethod
    def counted(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float | None) -> LayerSpec:
        """The first layer of a group gathers, and all tokens are rebuilt after the last.

        Raises ConfigError if tokens were removed before: clusters need the whole grid.
        """
        check(spec.count_group == config.num_tokens,
              f"{config.plan[spec.layer]!r} needs all {config.num_tokens} tokens, but layer {spec.layer} gets "
              f"{spec.count_group}")  # fmt: skip
        count = spec.count_in
        if keep_rate is not None:
            rows, columns = coarser(config.grid, keep_rate)
            count = config.num_prefix_tokens + rows * columns
        opens = keep_rate is not None and count < spec.count_in
        count_out = spec.count_group if spec.closes else count
        return spec._replace(opens=opens, count=count, count_out=count_out)

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        if self.spec.opens:
            reduction = self.gathered(state.tokens)
            state = state.opened(reduction.merge(state.tokens), reduction)
        state = super().apply(block, state, context)
        return state.restored() if self.spec.closes else state

    def gathered(self, tokens: Tokens) -> Reduction:
        """The reduction of all tokens [b n d] to prefix and clusters, and how patches are rebuilt."""
        prefix, choices = self.num_prefix_tokens, self.choices
        patches = tokens[:, prefix:]
        weights = soft_clusters(
            patches, self.grid, self.pooled, rounds=choices.cluster_rounds,
            temperature=choices.cluster_temperature, window=choices.cluster_window,
        )  # fmt: skip
        centres = jnp.einsum("bsn,bnd->bsd", weights, patches, precision="highest")
        back = reconstruction(
            patches, centres, temperature=choices.cluster_temperature,
            neighbours=choices.cluster_neighbours,
        )  # fmt: skip

        source = TokenWeights(beside_prefix(weights, prefix), beside_prefix(back, prefix))
        return Reduction(source)

    def own_macs(self, block: Block) -> int:
        """Distances and means in each round, then distances, merging, and rebuilding once."""
        if not self.spec.opens:
            return 0
        products = 2 * self.choices.cluster_rounds + 3
        patches = self.spec.count_in - self.num_prefix_tokens
        return products * patches * self.num_clusters * block.width


def after_five_twelfths(plan: str, depth: int) -> tuple[str, ...]:
    """A `whole_plan`: all layers after the first 10 of 24, 5 of 12."""
    return at_layers(plan, depth, range(max(depth * 5 // 12, 1), depth))


METHODS = (
    Method(
        name="expedit",
        kind=Expedit,
        label="Expedit",
        colours=("#6d5fc0", "#b0a6f0"),
        whole_plan=after_five_twelfths,
        equal_gmacs=True,
        fields={"budget": "uniform", "scan_layers": False},
    ),
)
