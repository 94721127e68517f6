"""The ordinary transformer layer: every token goes through the block."""

from tosa_jax.models.layers import AttentionFn, Block
from tosa_jax.models.method import DENSE, Method
from tosa_jax.models.token_state import LayerContext, LayerKind, LayerSpec, TokenState
from tosa_jax.models.vit_config import STANDARD, ViTConfig


class Standard(LayerKind):
    """Runs the block on all tokens that reach it. Other kinds subclass it and override what differs."""

    selects = False
    nests = False
    proportional = True

    @classmethod
    def counted(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float | None) -> LayerSpec:
        """`spec` as it is: every token goes on, whatever `keep_rate`."""
        return spec

    def block_macs(self, block: Block) -> int:
        """Multiply-adds of the block for one example, on the `count` tokens of the layer's `spec`."""
        return block.macs(self.spec.count)

    def own_macs(self, block: Block) -> int:
        """None: the kind does nothing beside running the block."""
        return 0

    def needs(self) -> AttentionFn | None:
        """None: the layer before may run any attention."""
        return None

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        """The state after the block ran on all its tokens. Sizes weigh in attention, and masked tokens are not read."""
        context = context.weighing(state.sizes if self.proportional else None, state.mask)
        tokens, summary = context.run(block, state.tokens, state.rotary)
        state = state.attended(tokens, summary)
        return state if context.read is None else state.cut_off()

    def restore(self, state: TokenState) -> TokenState:
        """The state with all n tokens back in their places."""
        return state.restored_grid()


METHODS = (
    Method(
        name=DENSE,
        kind=Standard,
        takes_padding=True,
        plan=STANDARD,
        label="dense, fine-tuned as long",
        short_label="dense",
        colours=("#59616e", "#a9b1be"),
        has_budget=False,
    ),
)
