"""Selection by redundancy: a patch is bypassed where another one resembles it, whatever attention it gets.

Between a layer's two branches the keys of its own attention are compared, as in ToMe (Bolya et al. 2023, "Token
Merging: Your ViT But Faster"), and the most redundant patches leave: their stand-ins go on as the mean of both. Layer
by layer fewer tokens remain. Unlike merged tokens, bypassed ones keep what sets them apart from their stand-in, and
rejoin with it. No map is read, and nothing is fitted.
"""

from flax import nnx

from tosa_jax.models.layers import Block
from tosa_jax.models.methods.tosa import SelectiveLayer
from tosa_jax.models.stream import LayerCall, Place, Stream
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.stand_ins import least_dissimilar, select_dissimilar
from tosa_jax.token_ops import with_one_hot


class Redundancy(SelectiveLayer):
    """Attention on the tokens that come in, MLP on those that stay; neighbours of the kind go on from there."""

    nests = True
    default_bypass = "shared"
    least_count = staticmethod(least_dissimilar)

    def __init__(self, config: ViTConfig, place: Place, *, rngs: nnx.Rngs) -> None:
        check(config.bypass in ("", "shared"),
              f"bypass={config.bypass!r}: the layer kind 'redundancy' works with 'shared' alone")  # fmt: skip
        super().__init__(config, place, rngs=rngs)

    def apply(self, block: Block, stream: Stream, call: LayerCall) -> Stream:
        call = self.weighing_sizes(stream, call)

        def attend(query, key, value):
            out, summary = call.attend(query, key, value)
            return out, (summary, key.mean(axis=2))

        update, (summary, keys) = block.attn_branch(stream.tokens, attend)
        tokens = stream.tokens + (call.drop(update, 0) if call.drop else update)
        if self.place.opens:
            chosen, scores = select_dissimilar(keys, self.place.count, self.num_prefix_tokens)
            if self.one_hot:
                chosen = with_one_hot(chosen, tokens.dtype)
            entered = self.bypass.open(block, tokens, chosen, stream.sizes)
            stream = stream.opened(*entered, scores)
            tokens = stream.tokens
        update = block.mlp_branch(tokens)
        tokens = tokens + (call.drop(update, 1) if call.drop else update)
        stream = stream._replace(tokens=tokens, summary=summary)
        return stream.restored() if self.place.closes else stream

    def block_macs(self, block: Block) -> int:
        return block.attn_macs(self.place.count_in) + block.mlp_macs(self.place.count)

    def own_macs(self, block: Block) -> int:
        if not self.place.opens:
            return 0
        into, left = self.place.count_in, self.place.count
        candidates = (into - self.num_prefix_tokens + 1) // 2
        matching = candidates * (into - candidates) * (block.width // block.attn.num_heads)
        return matching + (into - left) * left * block.width * self.bypass.pool
