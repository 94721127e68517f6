"""Control: tokens selected by the attention of the class token, as EViT does (Liang et al. 2022)."""

from flax import nnx

from tosa_jax.models.layers import AttentionFn, Bias, Block
from tosa_jax.models.method import Method
from tosa_jax.models.methods.selective import SelectiveLayer
from tosa_jax.models.token_state import LayerSpec
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import Heads, Scores
from tosa_jax.ops.attention import attention, first_row, pool_heads


class ClassAttention(SelectiveLayer):
    """Selects the tokens that the class token attends to most in the layer before, as EViT does (Liang et al. 2022).

    Only the class token's row of the map is needed. It is computed separately, so that the attention of that layer can
    run in its fastest form. Raises ConfigError for a network without a class token.
    """

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        check(config.class_token, "the layer kind 'class_attention' needs a class token")
        super().__init__(config, spec, rngs=rngs)

    def needs(self) -> AttentionFn | None:
        return self._read_class_row if self.spec.opens else None

    def _read_class_row(
        self, query: Heads, key: Heads, value: Heads, key_bias: Bias = None
    ) -> tuple[Heads, Scores]:
        row = first_row(query, key, key_bias)
        return attention(query, key, value, key_bias), pool_heads(row, self.head_pool)

    def own_macs(self, block: Block) -> int:
        reading = self.num_tokens * self.width if self.spec.opens else 0
        return super().own_macs(block) + reading


METHODS = (
    Method(
        name="class_attention",
        kind=ClassAttention,
        takes_padding=True,
        label="class token's attention",
        colours=("#2f8a5b", "#6fcf9b"),
    ),
)
