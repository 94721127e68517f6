"""The ordinary transformer layer: every token goes through the block."""

from tosa_jax.models.layers import AttentionFn, Block
from tosa_jax.models.method import DENSE, Method
from tosa_jax.models.token_state import LayerContext, LayerKind, LayerSpec, TokenState
from tosa_jax.models.vit_config import STANDARD, ViTConfig


class Standard(LayerKind):
    """Runs the block on all tokens. Other kinds start from it and change what they must."""

    selects = False
    nests = False
    proportional = True

    @classmethod
    def counted(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float | None) -> LayerSpec:
        """`spec` with the token counts of a layer of this kind; all are `count_in` there.

        keep_rate  share of the patches to keep; None where the layer chooses nothing.

        Raises ConfigError: the kind cannot reach that count.
        """
        return spec

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
        context = context.weighing(state.sizes if self.proportional else None, state.mask)
        tokens, summary = context.run(block, state.tokens)
        return state._replace(tokens=tokens, summary=summary)

    def restore(self, state: TokenState) -> TokenState:
        """The token state with all tokens back in their places."""
        return state.restored_grid()


METHODS = (
    Method(
        name=DENSE,
        kind=Standard,
        plan=STANDARD,
        label="dense, fine-tuned as long",
        short_label="dense",
        colours=("#59616e", "#a9b1be"),
        has_budget=False,
    ),
)
