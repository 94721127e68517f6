"""Control: the network without its selective layers, as if they selected no token."""

from tosa_jax.models.layers import Block
from tosa_jax.models.method import Method
from tosa_jax.models.methods.selective import SelectiveLayer
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig


class Skip(Standard):
    """Leaves all tokens as they are and does not run the block."""

    selects = True

    @classmethod
    def counted(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float | None) -> LayerSpec:
        """Counts as for a layer that selects, so that plans and reports are alike; the next layer gets all tokens."""
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
        takes_padding=True,
        label="selective layers skipped",
        colours=("#c2334d", "#f07f92"),
        has_budget=False,
    ),
)
