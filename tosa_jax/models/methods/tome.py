"""ToMe, Token Merging (Bolya et al. 2023, arXiv 2210.09461): in each layer the most similar tokens become one.

Tokens at even places look for the most similar one at an odd place, by the cosine of their keys. The r best pairs merge
into means weighted by size, and a merged token counts in attention as often as it stands for others (proportional
attention). Nothing is trained. For dense prediction, merged tokens are copied back to where they came from.
"""

from jaxtyping import Array, Float

from tosa_jax.models.layers import Bias, Block
from tosa_jax.models.method import Method, every_layer
from tosa_jax.models.methods.reducing import (
    ReducingLayer,
    RemovalOptions,
    left_after_merging,
    sizes_of,
)
from tosa_jax.models.token_state import LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.ops.array_types import Heads, Scores, Tokens
from tosa_jax.ops.reduction import Reduction, pooled
from tosa_jax.ops.token_matching import (
    bipartite_matching,
    least_after_matching,
    matching_macs,
    mean_of_heads,
)


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
        return left_after_merging(config, spec, keep_rate, least)

    def report(self, query: Heads, key: Heads, value: Heads, bias: Bias) -> Float[Array, "b n dh"]:
        """What is compared: keys as their mean over heads, [b n dh]."""
        return mean_of_heads(key)

    def reduction(
        self, tokens: Tokens, reported: Float[Array, "b n dh"], state: TokenState
    ) -> tuple[Reduction, Scores]:
        prefix = self.num_prefix_tokens
        pairs, scores = bipartite_matching(
            reported, self.spec.count, prefix, first=prefix % 2, present=state.present
        )
        return pooled(pairs, sizes_of(state)), state.past_padding(scores, 0.0)

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
        takes_padding=True,
        label="ToMe",
        colours=("#5b6b1f", "#b5c95a"),
        whole_plan=every_layer,
        equal_gmacs=True,
        fields={"budget": "linear", "removed": (), "scan_layers": False},
    ),
)
