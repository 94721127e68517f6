"""The ordinary transformer layer: every token goes through the block."""

from flax import nnx

from tosa_jax.models.layers import Attend, Block
from tosa_jax.models.stream import LayerCall, Place, Stream
from tosa_jax.models.vit_config import ViTConfig


class Standard(nnx.Module):
    """Runs the block on all tokens. Other kinds start from it and change what they must."""

    selects = False
    nests = False
    fit_kind = "standard"

    def __init__(self, config: ViTConfig, place: Place, *, rngs: nnx.Rngs) -> None:
        self.place = place

    def block_macs(self, block: Block) -> int:
        """Multiply-adds of the block for one example, on the tokens that this kind runs it on."""
        return block.macs(self.place.count)

    def own_macs(self, block: Block) -> int:
        """Multiply-adds of what the kind does beside it."""
        return 0

    def needs(self) -> Attend | None:
        """The attention that the layer before must run, or None."""
        return None

    def apply(self, block: Block, stream: Stream, call: LayerCall) -> Stream:
        """The stream after the layer."""
        tokens, summary = call.run(block, stream.tokens)
        return stream._replace(tokens=tokens, summary=summary)

    def restore(self, stream: Stream) -> Stream:
        """The stream with all tokens back in their places."""
        return stream.restored()
