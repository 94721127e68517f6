"""AiluRus (Li et al. 2023, arXiv 2311.01197): the later layers run on anchors, which stand for their surroundings.

After the first layers, density peaks among the patches become anchors. Each patch joins the anchor nearest to it, an
anchor becomes the mean of its group, the layers that follow run on anchors, and at their end each patch gets a copy of
its anchor ("unfolding"). No code was published. What is known is this course; the rest is this project's choice: the
distance (features of unit length and places on the grid of side 1, `anchor_space` times), density over
`anchor_neighbours`, and anchors that count in attention as often as they stand for patches.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tosa_jax.models.layers import Block
from tosa_jax.models.method import Method, at_layers
from tosa_jax.models.methods.selective import SelectiveLayer
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.options import Options
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import Scores, Tokens
from tosa_jax.ops.clustering import density_peaks, squared_distances
from tosa_jax.ops.reduction import pooled
from tosa_jax.ops.token_selection import Selection, select_tokens, with_one_hot


@dataclass(frozen=True, kw_only=True)
class AiluRusOptions(Options):
    """What is near. Raises ConfigError for values out of range.

    anchor_space       how much a distance on the grid counts beside that of features; 0: not at all.
    anchor_neighbours  how many of the nearest patches make the density around one; at least 1.
    """

    anchor_space: float = 1.0
    anchor_neighbours: int = 5

    def __post_init__(self) -> None:
        check(self.anchor_space >= 0, f"anchor_space={self.anchor_space} is negative")
        check(self.anchor_neighbours >= 1,
              f"anchor_neighbours={self.anchor_neighbours} must be at least 1")  # fmt: skip


class AiluRus(Standard):
    """Runs a group of layers on the share `keep_rate` of the patches, the anchors."""

    selects = True
    options = (AiluRusOptions,)

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        self.choices = config.options_of(AiluRusOptions)
        self.num_prefix_tokens = config.num_prefix_tokens
        self.grid, self.one_hot = config.grid, config.gather == "one_hot"

    @classmethod
    def counted(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float | None) -> LayerSpec:
        """The first layer of a group finds the anchors, and all tokens come back after the last.

        Raises ConfigError if tokens were removed before: the places of all patches count.
        """
        check(spec.count_group == config.num_tokens,
              f"{config.plan[spec.layer]!r} needs all {config.num_tokens} tokens, but layer {spec.layer} gets "
              f"{spec.count_group}")  # fmt: skip
        counted = SelectiveLayer.counted(config, spec, keep_rate)
        return counted._replace(opens=spec.opens and counted.count < spec.count_in)

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        if self.spec.opens:
            groups, scores = self.anchored(state.tokens)
            if self.one_hot:
                groups = with_one_hot(groups, state.tokens.dtype)
            reduction = pooled(groups, jnp.ones(state.tokens.shape[:2]))
            state = state.opened(reduction.merge(state.tokens), reduction, scores)
        state = super().apply(block, state, context)
        return state.restored() if self.spec.closes else state

    def anchored(self, tokens: Tokens) -> tuple[Selection, Scores]:
        """The anchors among tokens [b n d], with the groups around them, and how much each token is one [b n]."""
        prefix = self.num_prefix_tokens
        patches = jax.lax.stop_gradient(tokens[:, prefix:]).astype(jnp.float32)
        patches = patches / jnp.linalg.norm(patches, axis=2, keepdims=True)
        rows, columns = self.grid
        places = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1) / max(self.grid)
        apart = np.square(places[:, None] - places[None]).sum(axis=2)
        squares = squared_distances(patches, patches)
        apart = jnp.asarray(self.choices.anchor_space * apart, jnp.float32)
        distances = jnp.sqrt(squares + apart[None])
        peaks = density_peaks(distances, self.choices.anchor_neighbours)
        scores = jnp.pad(peaks, ((0, 0), (prefix, 0)), constant_values=jnp.inf)
        anchors = select_tokens(scores, self.spec.count, prefix)
        is_anchor = anchors.mask[:, prefix:]
        nearest = jnp.where(is_anchor[:, None], distances, jnp.inf).argmin(axis=2)
        slot = jnp.take_along_axis(anchors.slot[:, prefix:], nearest, axis=1)
        own = jnp.where(is_anchor, anchors.slot[:, prefix:], slot)
        slot = jnp.concatenate([anchors.slot[:, :prefix], own], axis=1)
        return anchors._replace(slot=slot), scores

    def own_macs(self, block: Block) -> int:
        """Distances of all patches, and the means."""
        if not self.spec.opens:
            return 0
        into, left = self.spec.count_in, self.spec.count
        return ((into - self.num_prefix_tokens) ** 2 + (into - left) * left) * block.width


def from_the_third_on(plan: str, depth: int) -> tuple[str, ...]:
    """A `whole_plan`: all layers after the first two, as in the paper."""
    return at_layers(plan, depth, range(min(2, depth - 1), depth))


METHODS = (
    Method(
        name="ailurus",
        kind=AiluRus,
        label="AiluRus",
        colours=("#4d7d33", "#9fce83"),
        whole_plan=from_the_third_on,
        equal_gmacs=True,
        fields={"budget": "uniform", "scan_layers": False},
    ),
)
