"""Selection by redundancy: the patches that most resemble another patch are bypassed.

As in ToMe (Bolya et al. 2023, "Token Merging: Your ViT But Faster"), the keys of a layer's attention are compared
between its two branches. The patches with the most similar partners are bypassed, and each partner goes on as the mean
of both. Every layer leaves fewer tokens. Unlike ToMe's merged tokens, bypassed ones get the updates of their partner
and rejoin different from it. No attention map is read, and nothing is fitted.

`redundancy_matching="ward"` chooses other pairs at the same cost. It goes by the distance of keys and not by their
direction, prefers small groups to large ones, and has the two colours of a chessboard for the branches.
"""

from dataclasses import dataclass

from flax import nnx

from tosa_jax.models.bypass import BypassOptions
from tosa_jax.models.layers import Block
from tosa_jax.models.method import Method, every_layer
from tosa_jax.models.methods.reducing import reduced_between, sizes_of
from tosa_jax.models.methods.selective import SelectiveLayer
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.options import Options
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig, check, check_choice
from tosa_jax.ops.reduction import Reduction
from tosa_jax.ops.token_matching import (
    bipartite_matching,
    least_after_matching,
    matching_macs,
    mean_of_heads,
)
from tosa_jax.ops.token_selection import with_one_hot


@dataclass(frozen=True, kw_only=True)
class RedundancyOptions(Options):
    """Which patches pair. Raises ConfigError for values out of range.

    redundancy_matching  "cosine": every second patch with the one of the others whose key has the largest cosine, as in
                         ToMe. "ward": each patch on a field of one colour of a chessboard with the one on the other
                         colour that costs least to merge with (`ops.token_matching.merging_costs`).
    """

    redundancy_matching: str = "cosine"

    def __post_init__(self) -> None:
        check_choice("redundancy_matching", self.redundancy_matching, ("cosine", "ward"))


class Redundancy(SelectiveLayer):
    """Runs attention on all tokens that reach the layer, and the MLP on those that stay.

    The next layer of the same kind chooses among those. Raises ConfigError for a bypass other than "shared".
    """

    nests = True
    default_bypass = "shared"
    options = (*SelectiveLayer.options, RedundancyOptions)

    @classmethod
    def counted(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float | None) -> LayerSpec:
        """Each layer selects among the tokens that the one before it left, and keeps at least half of the patches.

        Raises ConfigError if fewer are asked for. With `budget="linear"` half of them are kept then.
        """
        wanted = super().counted(config, spec, keep_rate).count
        least = least_after_matching(
            spec.count_in, config.num_prefix_tokens, rows=_chessboard_rows(config)
        )
        count = max(wanted, least) if config.budget == "linear" else wanted
        check(
            count >= least,
            f"keep_rate={config.keep_rate} leaves layer {spec.layer} {count} of {spec.count_in} tokens; "
            f"{config.plan[spec.layer]!r} can bypass every second patch at most and leaves {least}",
        )
        count_out = spec.count_group if spec.closes else count
        return spec._replace(opens=count < spec.count_in, count=count, count_out=count_out)

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        bypass = config.options_of(BypassOptions).bypass
        check(bypass in ("", "shared"),
              f"bypass={bypass!r}: the layer kind 'redundancy' works with 'shared' alone")  # fmt: skip
        super().__init__(config, spec, rngs=rngs)
        self.by_cost = config.options_of(RedundancyOptions).redundancy_matching == "ward"
        self.rows = _chessboard_rows(config)

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        if self.bypass is None:
            state = Standard.apply(self, block, state, context)
            return state.restored() if self.spec.closes else state
        bypass, sizes = self.bypass, state.sizes

        def reduce(state, keys):
            chosen, scores = bipartite_matching(
                keys, self.spec.count, self.num_prefix_tokens, present=state.present,
                rows=self.rows, sizes=sizes_of(state) if self.by_cost else None,
            )  # fmt: skip
            scores = state.past_padding(scores, 0.0)
            if context.read is not None:  # nobody reads what merging would change
                return state.reporting(Reduction(chosen), scores)
            if self.one_hot:
                chosen = with_one_hot(chosen, state.tokens.dtype)
            entered = bypass.open(block, state.tokens, chosen, state.counts)
            return state.opened(*entered, scores)

        weighing = context.weighing(sizes if self.proportional else None, state.mask)
        state = reduced_between(
            block, state, weighing, lambda query, key, value: mean_of_heads(key), reduce
        )
        if context.read is not None:
            return state.cut_off()
        return state.restored() if self.spec.closes else state

    def block_macs(self, block: Block) -> int:
        return block.attn_macs(self.spec.count_in) + block.mlp_macs(self.spec.count)

    def own_macs(self, block: Block) -> int:
        if self.bypass is None:
            return 0
        into, left = self.spec.count_in, self.spec.count
        head_dim = block.width // block.attn.num_heads
        matching = matching_macs(into, self.num_prefix_tokens, head_dim, rows=self.rows)
        return matching + (into - left) * left * block.width * self.bypass.pool


def _chessboard_rows(config: ViTConfig) -> int:
    """What `ops.token_matching.candidates` needs for a chessboard; 0 where every second patch is meant, or is one."""
    rows, columns = config.grid
    wanted = config.options_of(RedundancyOptions).redundancy_matching == "ward"
    return rows if wanted and columns % 2 == 0 and not config.max_patches else 0


METHODS = (
    Method(
        name="redundancy",
        kind=Redundancy,
        takes_padding=True,
        label="redundancy, every layer",
        short_label="redundancy",
        colours=("#b03a9a", "#e58ad4"),
        whole_plan=every_layer,
        equal_gmacs=True,
        # Its bypass is always "shared", and layers with different token counts cannot be scanned.
        fields={"budget": "linear", "bypass": "", "redundancy_weight": 0.0, "scan_layers": False},
        searched=({"redundancy_matching": "ward"},),
    ),
)
