"""ToMe, Token Merging (Bolya et al. 2023, arXiv 2210.09461): in each layer the most similar tokens become one.

Tokens at even places look for the most similar one at an odd place, by the cosine of their keys. The r best pairs merge
into means weighted by size, and a merged token counts in attention as often as it stands for others (proportional
attention). Nothing is trained. For dense prediction, merged tokens are copied back to where they came from.
"""

from jaxtyping import Array, Float

from tosa_jax.models.layers import Bias, Block
from tosa_jax.models.method import Method, every_layer
from tosa_jax.models.methods.reducing import ReducingLayer, RemovalOptions, sizes_of
from tosa_jax.models.token_state import LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import Heads, Scores, Tokens
from tosa_jax.ops.reduction import Reduction, pooled
from tosa_jax.ops.token_matching import (
    bipartite_matching,
    least_after_matching,
    matching_macs,
    mean_of_heads,
)
from tosa_jax.ops.token_selection import num_selected


class ToMe(ReducingLayer):
    """Merges patches after attention, at most half of them.

    `removed` is the paper's r. Without it `keep_rate` is the share of all patches that are left after each layer, with
    `budget="linear"` falling by the same number in each, down to half of what reaches a layer.
    """

    options = (RemovalOptions,)

    @classmethod
    def count_left(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float) -> int:
        """Raises ConfigError where more than half of the patches would have to merge."""
        prefix = config.num_prefix_tokens
        least = least_after_matching(spec.count_in, prefix, prefix % 2)
        removed = config.options_of(RemovalOptions).at(config, spec.layer)
        if removed is not None:
            return max(spec.count_in - removed, least)
        wanted = num_selected(config.num_patches, prefix, keep_rate, config.count_multiple)
        check(
            wanted >= least or config.budget == "linear",
            f"keep_rate={config.keep_rate} leaves layer {spec.layer} {wanted} of {spec.count_in} tokens; "
            f"{config.plan[spec.layer]!r} merges half of the patches at most and leaves {least}",
        )
        return max(wanted, least)

    def report(self, query: Heads, key: Heads, value: Heads, bias: Bias) -> Float[Array, "b n dh"]:
        """What is compared: keys as their mean over heads, [b n dh]."""
        return mean_of_heads(key)

    def reduction(
        self, tokens: Tokens, reported: Float[Array, "b n dh"], state: TokenState
    ) -> tuple[Reduction, Scores]:
        prefix = self.num_prefix_tokens
        pairs, scores = bipartite_matching(reported, self.spec.count, prefix, first=prefix % 2)
        return pooled(pairs, sizes_of(state)), scores

    def own_macs(self, block: Block) -> int:
        if not self.spec.opens:
            return 0
        into, left = self.spec.count_in, self.spec.count
        prefix, head_dim = self.num_prefix_tokens, block.width // block.attn.num_heads
        merging = (into - left) * left * block.width
        return matching_macs(into, prefix, head_dim, prefix % 2) + merging


METHODS = (
    Method(
        name="tome",
        kind=ToMe,
        label="ToMe",
        colours=("#5b6b1f", "#b5c95a"),
        whole_plan=every_layer,
        equal_gmacs=True,
        fields={"budget": "linear", "removed": (), "scan_layers": False},
    ),
)
