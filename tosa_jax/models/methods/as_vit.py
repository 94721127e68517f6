"""AS-ViT, Adaptive Sparse ViT (Liu et al. 2022, arXiv 2209.13802): class attention against learned thresholds.

In the layer before, a patch's score is the class token's attention to it, each head weighted by the length of its
output at that patch. In training, patches stay whose score is above a learned threshold; all patches remain, and the
others are not read. At inference the published code counts how many stay, another number in each image; here the
number is fixed, and the patches with the highest scores stay. The paper's loss compares the cost of the whole network
with a budget. As counts are fixed here, each layer's share of kept patches is compared with the wanted one instead. For
dense prediction, patches that were dropped come back as they were.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tosa_jax.models.layers import AttentionFn, Bias, Block
from tosa_jax.models.method import Method, at_layers
from tosa_jax.models.methods.dynamicvit import LearnedPruning, straight_through
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import Heads, Scores
from tosa_jax.ops.attention import attention, first_row

TEMPERATURE = 1e-4
"""Of the sigmoid whose gradient trains a threshold, as published."""


class ASViT(LearnedPruning):
    """Keeps the share `keep_rate` of the patches that reach the layer."""

    reads_class_token = True

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        stage = config.plan[: spec.layer + 1].count(config.plan[spec.layer])
        # Published for 196 patches, among which the class token's attention is divided.
        start = 0.001 * stage * 196 / config.num_patches
        self.threshold = nnx.Param(jnp.asarray(start, config.param_dtype)) if spec.opens else None

    @classmethod
    def counted(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float | None) -> LayerSpec:
        """As the base class. Raises ConfigError also for a first layer: the attention before it is read."""
        check(spec.layer > 0,
              f"plan starts with {config.plan[0]!r}, which needs a standard layer before it")  # fmt: skip
        return super().counted(config, spec, keep_rate)

    def needs(self) -> AttentionFn | None:
        return self._score if self.spec.opens else None

    def _score(
        self, query: Heads, key: Heads, value: Heads, key_bias: Bias = None
    ) -> tuple[Heads, Scores]:
        out = attention(query, key, value, key_bias)
        return out, head_weighted_row(out, first_row(query, key, key_bias))

    def scores(self, state: TokenState) -> Scores:
        return state.summary

    def decide(self, scores: Scores, context: LayerContext) -> Scores:
        """1 above the threshold, with the gradient of a steep sigmoid."""
        assert self.threshold is not None  # the layer opens
        above = scores - self.threshold[...].astype(jnp.float32)
        return straight_through(jax.nn.sigmoid(above / TEMPERATURE))

    def miss(self, share: jax.Array) -> jax.Array:
        return jnp.abs(share - self.wanted)

    def own_macs(self, block: Block) -> int:
        """The class token's row once more, and the lengths of the heads' outputs."""
        return 2 * self.spec.count_in * block.width if self.spec.opens else 0


def head_weighted_row(out: Heads, row: jax.Array) -> Scores:
    """The class token's attention `row` [b h n], each head by its share in the length of the outputs [b n h dh]."""
    squares = jnp.square(out.astype(jnp.float32)).sum(axis=3).transpose(0, 2, 1)
    length = jnp.sqrt(squares + 1e-12)
    return (row * length / (length.sum(axis=1, keepdims=True) + 1e-8)).sum(axis=1)


def in_thirds(plan: str, depth: int) -> tuple[str, ...]:
    """A `whole_plan`: the layers after a third, 7 and 10 twelfths of the depth, 4, 7 and 10 of twelve, as published."""
    return at_layers(plan, depth, {depth * part // 12 for part in (4, 7, 10)} - {0})


METHODS = (
    Method(
        name="as_vit",
        kind=ASViT,
        label="AS-ViT",
        colours=("#5c4a3a", "#c0a98f"),
        whole_plan=in_thirds,
        equal_gmacs=True,
        fields={"budget": "uniform", "scan_layers": False},
    ),
)
