"""The ordinary transformer layer: every token goes through the block."""

from flax import nnx

from tosa_jax.models.layers import AttentionFn, Block
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig


class Standard(nnx.Module):
    """Runs the block on all tokens. Other kinds start from it and change what they must."""

    selects = False
    nests = False
    fit_kind = "standard"

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        self.spec = spec

    def block_macs(self, block: Block) -> int:
        """Multiply-adds of the block for one example, on the tokens that this kind runs it on."""
        return block.macs(self.spec.count)

    def own_macs(self, block: Block) -> int:
        """Multiply-adds of what the kind does beside it."""
        return 0

    def needs(self) -> AttentionFn | None:
        """The attention that the layer before must run, or None."""
        return None

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        """The token state after the layer."""
        tokens, summary = context.run(block, state.tokens)
        return state._replace(tokens=tokens, summary=summary)

    def restore(self, state: TokenState) -> TokenState:
        """The token state with all tokens back in their places."""
        return state.restored()
