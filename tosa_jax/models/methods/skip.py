"""Control: the selective layers removed, which is what is left when no token is selected."""

from tosa_jax.models.layers import Block
from tosa_jax.models.method import Method
from tosa_jax.models.methods.selective import SelectiveLayer
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig


class Skip(Standard):
    """The layer removed: what is left when nothing is selected."""

    selects = True

    @classmethod
    def counted(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float | None) -> LayerSpec:
        """As of a layer that selects, though none of its tokens goes through a block."""
        counted = SelectiveLayer.counted(config, spec, keep_rate)
        return counted._replace(count_out=spec.count_in)

    def block_macs(self, block: Block) -> int:
        return 0

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        return state


METHODS = (
    Method(
        name="skip",
        kind=Skip,
        label="selective layers skipped",
        colours=("#c2334d", "#f07f92"),
        has_budget=False,
    ),
)
