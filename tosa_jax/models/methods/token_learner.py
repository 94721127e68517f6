"""TokenLearner (Ryoo et al. 2021, arXiv 2106.11297): patches are mixed into a few tokens by learned maps.

In the form of version 1.1, a small MLP gives each patch a logit for each learned token, softmax over the patches makes
maps of them, and a learned token is the mean of all patches by its map. "token_learner" does this once, and the later
layers run on the few. "token_fuser" does it in each of its layers, runs the block on the few, and mixes what they
became back into all patches, so that the whole grid is there after every layer. Both have to be trained from the start.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tosa_jax.models.layers import Block, layer_norm, linear
from tosa_jax.models.method import Method, at_layers
from tosa_jax.models.methods.reducing import PersistentReduction
from tosa_jax.models.token_state import LayerContext, LayerSpec, TokenState
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.ops.array_types import Tokens
from tosa_jax.ops.reduction import Reduction, TokenWeights, beside_prefix

BOTTLENECK = 64
"""Width within the MLPs that make maps, as published."""


class Maps(nnx.Module):
    """Logits [b n s] of patches [b n d], for each of s learned tokens: a norm and an MLP."""

    def __init__(self, config: ViTConfig, count: int, *, rngs: nnx.Rngs) -> None:
        self.norm = layer_norm(config, rngs)
        self.fc1 = linear(config, config.embed_dim, BOTTLENECK, rngs)
        self.fc2 = linear(config, BOTTLENECK, count, rngs)

    def __call__(self, patches: Tokens) -> Float[Array, "b n s"]:
        hidden = jax.nn.gelu(self.fc1(self.norm(patches)), approximate=True)
        return self.fc2(hidden).astype(jnp.float32)

    def macs(self, n: int) -> int:
        """Multiply-adds for one example of n patches."""
        return n * BOTTLENECK * (self.fc1.in_features + self.fc2.out_features)


class TokenLearner(PersistentReduction):
    """Mixes the patches into the share `keep_rate` of their number before the layer, for good.

    For dense prediction, a patch is the mean of the learned tokens, weighted by its share in each.
    """

    proportional = False

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        count = spec.count - config.num_prefix_tokens
        self.maps = Maps(config, count, rngs=rngs) if spec.opens else None

    def learned(self, tokens: Tokens) -> Reduction:
        """The reduction of tokens [b n d] to the prefix and the learned ones."""
        assert self.maps is not None  # the layer opens
        prefix = self.num_prefix_tokens
        maps = jax.nn.softmax(self.maps(tokens[:, prefix:]), axis=1).transpose(0, 2, 1)
        return Reduction(TokenWeights(beside_prefix(maps, prefix)))

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        if self.spec.opens:
            reduction = self.learned(state.tokens)
            state = state.reduced(reduction.merge(state.tokens), reduction)
        return super().apply(block, state, context)

    def own_macs(self, block: Block) -> int:
        """The maps, and the means by them."""
        if self.maps is None:
            return 0
        patches = self.spec.count_in - self.num_prefix_tokens
        learned = self.spec.count - self.num_prefix_tokens
        return self.maps.macs(patches) + patches * learned * block.width


class TokenFuser(TokenLearner):
    """Learns tokens, runs the block on them, and adds what they became to all patches, in each layer."""

    def __init__(self, config: ViTConfig, spec: LayerSpec, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, spec, rngs=rngs)
        if self.maps is None:
            return
        count = spec.count - config.num_prefix_tokens
        self.mix_norm1, self.mix_norm2 = layer_norm(config, rngs), layer_norm(config, rngs)
        zeros = nnx.initializers.zeros_init()
        self.mix = linear(config, count, count, rngs, kernel_init=zeros)
        self.back = Maps(config, count, rngs=rngs)

    @classmethod
    def counted(cls, config: ViTConfig, spec: LayerSpec, keep_rate: float | None) -> LayerSpec:
        """The block runs on the learned tokens; all tokens go on."""
        return super().counted(config, spec, keep_rate)._replace(count_out=spec.count_in)

    def apply(self, block: Block, state: TokenState, context: LayerContext) -> TokenState:
        if self.maps is None:
            return super().apply(block, state, context)
        reduction = self.learned(state.tokens)
        few = state.opened(reduction.merge(state.tokens), reduction)
        tokens, summary = context.run(block, few.tokens, few.rotary)
        few = few.attended(tokens, summary)
        if context.read is not None:
            return few.cut_off()
        prefix, patches = self.num_prefix_tokens, state.tokens[:, self.num_prefix_tokens :]
        labels = few.restored().labels
        if labels is not None and state.labels is not None:
            # Patches keep what they were, beside what they get.
            own = jnp.arange(labels.shape[1])[None, :, None] < prefix
            labels = jnp.where(own, labels, (state.labels + labels) / 2)
        patches = patches + self.fused(tokens[:, prefix:], patches)
        tokens = jnp.concatenate([tokens[:, :prefix], patches], axis=1)
        return state._replace(tokens=tokens, summary=few.summary, attention_map=None, labels=labels)

    def fused(self, learned: Float[Array, "b s d"], patches: Tokens) -> Tokens:
        """What the learned tokens [b s d], mixed among each other, add to each of the patches [b n d]."""
        mixed = self.mix(self.mix_norm1(learned).transpose(0, 2, 1)).transpose(0, 2, 1)
        shares = jax.nn.sigmoid(self.back(patches)).astype(learned.dtype)
        return jnp.einsum("bns,bsd->bnd", shares, self.mix_norm2(mixed))

    def own_macs(self, block: Block) -> int:
        """Besides learning: mixing the learned tokens, the shares of the patches, and the sums by them."""
        if self.maps is None:
            return 0
        patches = self.spec.count_in - self.num_prefix_tokens
        learned = self.spec.count - self.num_prefix_tokens
        fusing = self.back.macs(patches) + (learned + patches) * learned * block.width
        return super().own_macs(block) + fusing


def at_three_quarters(plan: str, depth: int) -> tuple[str, ...]:
    """A `whole_plan`: the layer after three quarters of the depth, 9 of twelve."""
    return at_layers(plan, depth, {depth * 3 // 4})


def from_three_quarters_on(plan: str, depth: int) -> tuple[str, ...]:
    """A `whole_plan`: all layers after three quarters of the depth, 9 to 11 of twelve."""
    return at_layers(plan, depth, range(depth * 3 // 4, depth))


METHODS = (
    Method(
        name="token_learner",
        kind=TokenLearner,
        label="TokenLearner",
        colours=("#b0781e", "#f0c26b"),
        whole_plan=at_three_quarters,
        equal_gmacs=True,
        fields={"budget": "uniform", "scan_layers": False},
    ),
    Method(
        name="token_fuser",
        kind=TokenFuser,
        label="TokenLearner with fuser",
        short_label="TokenFuser",
        colours=("#94452b", "#e39a80"),
        whole_plan=from_three_quarters_on,
        equal_gmacs=True,
        fields={"budget": "uniform"},
    ),
)
