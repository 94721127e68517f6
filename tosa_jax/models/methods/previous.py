"""Control: tokens selected by the attention map of the layer before, as ToSA would do without a selector."""

from tosa_jax.models.layers import AttentionFn, Bias
from tosa_jax.models.method import Method
from tosa_jax.models.methods.selective import SelectiveLayer
from tosa_jax.ops.array_types import Heads, Scores
from tosa_jax.ops.attention import attention_and_column_sums, pool_heads


class Previous(SelectiveLayer):
    """Selects by the column sums of the map of the layer before: ToSA without a selector."""

    def needs(self) -> AttentionFn | None:
        return self._sum_columns if self.spec.opens else None

    def _sum_columns(
        self, query: Heads, key: Heads, value: Heads, key_bias: Bias = None
    ) -> tuple[Heads, Scores]:
        out, sums = attention_and_column_sums(query, key, value, self.map_chunk, key_bias)
        return out, pool_heads(sums, self.head_pool)


METHODS = (
    Method(
        name="previous",
        kind=Previous,
        takes_padding=True,
        label="previous layer's map",
        colours=("#8a4fbe", "#bd94ea"),
    ),
)
