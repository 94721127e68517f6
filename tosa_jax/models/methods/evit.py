"""EViT (Liang et al. 2022, arXiv 2202.07800): tokens that the class token attends to least are fused into one.

After the attention of a few layers, the patches that get most of the class token's attention stay. The others are
summed, weighted by that attention, into one token more, or dropped. For dense prediction, patches that are gone get
copies of the token that they were fused into; dropped ones come back as they were.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from tosa_jax.models.layers import Bias, Block
from tosa_jax.models.method import Method, at_quarters
from tosa_jax.models.methods.reducing import ReducingLayer, class_row
from tosa_jax.models.options import Options
from tosa_jax.models.token_state import LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.ops.array_types import Heads, Scores, Tokens
from tosa_jax.ops.reduction import Reduction, TokenWeights
from tosa_jax.ops.token_selection import select_tokens


@dataclass(frozen=True, kw_only=True)
class EViTOptions(Options):
    """evit_fuse: inattentive tokens become one token more; otherwise they are dropped."""

    evit_fuse: bool = True


class EViT(ReducingLayer):
    """Keeps the share `keep_rate` of the patches that reach the layer, and the fused token."""

    options = (EViTOptions,)
    reads_class_token = True
    proportional = False

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        self.fuse = config.options_of(EViTOptions).evit_fuse

    @classmethod
    def count_left(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float) -> int:
        kept = super().count_left(config, spec, keep_rate)
        return kept + config.options_of(EViTOptions).evit_fuse

    def report(self, query: Heads, key: Heads, value: Heads, bias: Bias) -> Scores:
        """The class token's attention, [b n]."""
        return class_row(query, key, bias)

    def reduction(
        self, tokens: Tokens, reported: Scores, state: TokenState
    ) -> tuple[Reduction, Scores]:
        kept = select_tokens(reported, self.spec.count - self.fuse, self.num_prefix_tokens)
        if not self.fuse:
            return Reduction(kept, before=tokens), reported
        own = jax.nn.one_hot(kept.indices, tokens.shape[1])
        others = ~kept.mask[:, None]
        # The paper's sum: weights are the attention itself, and do not add up to 1.
        fused = jnp.where(others, jax.lax.stop_gradient(reported)[:, None], 0)
        back = jnp.concatenate([own, others], axis=1).transpose(0, 2, 1)
        source = TokenWeights(jnp.concatenate([own, fused], axis=1), back)
        return Reduction(source), reported

    def own_macs(self, block: Block) -> int:
        """The class token's row once more, and the weighted sum."""
        if not self.spec.opens:
            return 0
        fused = self.spec.count_in - self.spec.count + 1 if self.fuse else 0
        return (self.spec.count_in + fused) * block.width


METHODS = (
    Method(
        name="evit",
        kind=EViT,
        label="EViT",
        colours=("#1d7a8c", "#67c3d6"),
        whole_plan=at_quarters,
        equal_gmacs=True,
        fields={"budget": "uniform", "scan_layers": False},
    ),
)
