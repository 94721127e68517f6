"""The parts of a vision transformer (ViT), named as in timm: `PatchEmbed Attention Mlp LayerScale Block`.

Initialisation is DeiT's (facebookresearch/deit and the timm release it builds on): normal(.02) for linear
weights (timm truncates at +-2, a hundred deviations away), zero biases, and PyTorch's default for the patch
projection. Modules hold no random state: whatever is random gets its key as an argument.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.ops.array_types import Heads, Images, Keys, Queries, Tokens
from tosa_jax.ops.attention import attention

AttentionFn = Callable[[Heads, Heads, Heads], tuple[Heads, Any]]
"""`(query, key, value) -> (output, summary)`: how an attention runs, and what it reports of its map."""

Between = Callable[[Tokens, Any], tuple[Tokens, Any]]
"""`(tokens, summary) -> (tokens, summary)` between a block's two branches; the number of tokens may change."""

token_init = nnx.initializers.normal(0.02)
"""How DeiT starts linear weights, tokens and positions."""


def plain_attention(query: Queries, key: Keys, value: Keys) -> tuple[Queries, None]:
    """Attention that reports nothing: the fastest form."""
    return attention(query, key, value), None


def fold_key(key: jax.Array, number: int | jax.Array) -> jax.Array:
    """`jax.random.fold_in` for one key, or for one an example."""
    fold = jax.random.fold_in
    return jax.vmap(fold, (0, None))(key, number) if key.ndim else fold(key, number)


def draw(key: jax.Array, count: int, sample: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`sample(key)` for each of `count` examples, from a key an example or from one key for all."""
    return jax.vmap(sample)(key if key.ndim else jax.random.split(key, count))


class DropPath(NamedTuple):
    """Stochastic depth (Huang et al. 2016): an example's branch is left out with probability `rate`."""

    rate: Float[Array, ""] | float
    key: jax.Array

    def __call__(self, update: Tokens, branch: int) -> Tokens:
        """update [b n d] of branch 0 (attention) or 1 (MLP), scaled to keep its expectation."""
        keep = 1.0 - jnp.asarray(self.rate, jnp.float32)
        key = fold_key(self.key, branch)
        kept = draw(key, len(update), lambda k: jax.random.bernoulli(k, keep, (1, 1)))
        return jnp.where(kept, update / keep.astype(update.dtype), 0)


def linear(config: ViTConfig, in_dim: int, out_dim: int, rngs: nnx.Rngs, **fields) -> nnx.Linear:
    """A linear layer with DeiT's initialisation and the configuration's dtypes."""
    fields = {"kernel_init": token_init, "use_bias": True} | fields
    return nnx.Linear(
        in_dim, out_dim, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs, **fields
    )


def layer_norm(config: ViTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the width; its statistics are float32 whatever the compute dtype."""
    return nnx.LayerNorm(
        config.embed_dim, epsilon=config.norm_eps, dtype=config.dtype,
        param_dtype=config.param_dtype, rngs=rngs,
    )  # fmt: skip


class PatchEmbed(nnx.Module):
    """Images [b height width c] -> patch tokens [b patches d] in raster order.

    The strided convolution of timm, as a matrix product: `proj.kernel` is `[(row column channel), d]`.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        fan_in = config.patch_size**2 * config.in_chans
        bound = fan_in**-0.5
        uniform = nnx.initializers.uniform(2 * bound)

        def init(*args):
            return uniform(*args) - bound

        self.patch_size = config.patch_size
        self.proj = linear(config, fan_in, config.embed_dim, rngs, kernel_init=init, bias_init=init)

    def __call__(self, images: Images) -> Tokens:
        b, height, width, c = images.shape
        p = self.patch_size
        patches = images.reshape(b, height // p, p, width // p, p, c)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c)
        return self.proj(patches)


class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al. 2017): tokens [b n d] -> [b n d], and what `attention_fn` reports."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.num_heads = config.num_heads
        self.qkv = linear(
            config, config.embed_dim, 3 * config.embed_dim, rngs, use_bias=config.qkv_bias
        )
        self.proj = linear(config, config.embed_dim, config.embed_dim, rngs)

    def __call__(
        self,
        x: Tokens,
        attention_fn: AttentionFn = plain_attention,
        key_value: Float[Array, "b k d"] | None = None,
    ) -> tuple[Tokens, Any]:
        """x [b n d] attends to `key_value` [b k d], or to itself: the result [b n d], and the report."""
        b, n, d = x.shape
        if key_value is not None:
            shape = self.num_heads, d // self.num_heads
            query = self._project(x, 0, d).reshape(b, n, *shape)
            both = self._project(key_value, d, 3 * d).reshape(b, -1, 2, *shape)
            out, summary = attention_fn(query, both[:, :, 0], both[:, :, 1])
            return self.proj(out.reshape(b, n, d)), summary
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        out, summary = attention_fn(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.proj(out.reshape(b, n, d)), summary

    def _project(self, x: Tokens, start: int, stop: int) -> Float[Array, "b n e"]:
        """Columns [start, stop) of the layer `qkv`."""
        dtype = self.qkv.dtype
        out = x.astype(dtype) @ self.qkv.kernel[...][:, start:stop].astype(dtype)
        bias = self.qkv.bias
        return out if bias is None else out + bias[...][None, None, start:stop].astype(dtype)


class Mlp(nnx.Module):
    """Two linear layers with GELU between, or timm's packed SwiGLU (Shazeer 2020); tokens [b n d] -> [b n d]."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.kind = config.mlp
        hidden = config.mlp_dim
        self.fc1 = linear(config, config.embed_dim, hidden, rngs)
        out_of = hidden // 2 if self.kind == "swiglu" else hidden
        self.fc2 = linear(config, out_of, config.embed_dim, rngs)

    def __call__(self, x: Tokens) -> Tokens:
        x = self.fc1(x)
        if self.kind == "swiglu":
            gate, x = jnp.split(x, 2, axis=-1)
            return self.fc2(jax.nn.silu(gate) * x)
        return self.fc2(jax.nn.gelu(x, approximate=self.kind == "gelu_tanh"))


class LayerScale(nnx.Module):
    """A learned factor a channel on a branch (Touvron et al. 2021, CaiT)."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.gamma = nnx.Param(
            jnp.full(config.embed_dim, config.layer_scale, dtype=config.param_dtype)
        )

    def __call__(self, x: Tokens) -> Tokens:
        return x * self.gamma[...].astype(x.dtype)[None, None]


class Block(nnx.Module):
    """A pre-norm transformer layer (Dosovitskiy et al. 2021), tokens [b n d] -> [b n d] and its attention's summary.

    Its branches are public; `between` lets a method act between them.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.norm1 = layer_norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = layer_norm(config, rngs)
        self.mlp = Mlp(config, rngs=rngs)
        self.width, self.mlp_weights = config.embed_dim, config.mlp_weights
        self.ls1 = LayerScale(config, rngs=rngs) if config.layer_scale else None
        self.ls2 = LayerScale(config, rngs=rngs) if config.layer_scale else None

    def attn_branch(
        self,
        x: Tokens,
        attention_fn: AttentionFn = plain_attention,
        key_value: Float[Array, "b k d"] | None = None,
    ) -> tuple[Tokens, Any]:
        """The update [b n d] that attention adds to `x`, and what `attention_fn` reports.

        Keys and values come from `key_value` [b k d], or from `x` itself.
        """
        normed = None if key_value is None else self.norm1(key_value)
        update, summary = self.attn(self.norm1(x), attention_fn, normed)
        return self.ls1(update) if self.ls1 else update, summary

    def mlp_branch(self, x: Tokens) -> Tokens:
        """The update [b n d] that the MLP adds to `x`."""
        update = self.mlp(self.norm2(x))
        return self.ls2(update) if self.ls2 else update

    def __call__(
        self,
        x: Tokens,
        attention_fn: AttentionFn = plain_attention,
        drop_path: DropPath | None = None,
        between: Between | None = None,
    ) -> tuple[Float[Array, "b m d"], Any]:
        """The tokens after the layer, and what `attention_fn` reports; `between` may change both on the way."""
        update, summary = self.attn_branch(x, attention_fn)
        x = x + (drop_path(update, 0) if drop_path else update)
        if between is not None:
            x, summary = between(x, summary)
        update = self.mlp_branch(x)
        return x + (drop_path(update, 1) if drop_path else update), summary

    def macs(self, n: int) -> int:
        """Multiply-adds for one example of `n` tokens: projections, attention, MLP."""
        return self.attn_macs(n) + self.mlp_macs(n)

    def attn_macs(self, n: int, keys: int | None = None) -> int:
        """Those of the attention branch, for n queries and as many keys, or `keys`."""
        k = n if keys is None else keys
        return 2 * (n + k) * self.width**2 + 2 * n * k * self.width

    def mlp_macs(self, n: int) -> int:
        """Those of the MLP branch."""
        return n * self.mlp_weights
