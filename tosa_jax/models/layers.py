"""The parts of a vision transformer (ViT), named as in timm: `PatchEmbed Attention Mlp LayerScale Block`.

Initialisation is DeiT's (facebookresearch/deit and the timm release it builds on): normal(.02) for linear
weights (timm truncates at +-2, a hundred deviations away), zero biases, and PyTorch's default for the patch
projection. Modules hold no random state: whatever is random gets its key as an argument.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from tosa_jax.errors import ConfigError
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.ops.array_types import AttnMap, Heads, Images, Keys, Queries, Scores, Tokens
from tosa_jax.ops.attention import NOT_READ, attention, attention_logits, mixed_values
from tosa_jax.ops.platforms import by_platform
from tosa_jax.ops.rotary import Rotary, turn
from tosa_jax.ops.tpu_kernels import SUBLANES

AttentionFn = Callable[[Heads, Heads, Heads], tuple[Heads, Any]]
"""`(query, key, value) -> (output, summary)`: how an attention runs, and what it reports of its map.

One that may read a layer whose tokens are merged also takes `key_bias`, a `Bias`. The output may have fewer rows than
the query.
"""

Bias = Float[Array, "b k"] | None
"""What is added to the attention logits of each key; None: nothing."""

Between = Callable[[Tokens, Any], tuple[Tokens, Any]]
"""`(tokens, summary) -> (tokens, summary)` between a block's two branches; the number of tokens may change."""

UNREAD = 1e-7
"""What a token that is not read counts beside one that is, where a gradient has to reach the choice."""

token_init = nnx.initializers.normal(0.02)
"""How DeiT starts tokens."""


def plain_attention(query: Queries, key: Keys, value: Keys) -> tuple[Queries, None]:
    """Attention that reports nothing: the fastest form."""
    return attention(query, key, value), None


def log_counts(weights: Scores) -> Scores:
    """What is added to the logits of tokens that count `weights` [b n] times as keys; one that counts 0 is not read."""
    return jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1.0)), NOT_READ)


def fold_key(key: jax.Array, number: int | jax.Array) -> jax.Array:
    """`jax.random.fold_in` for one key, or for one an example."""
    fold = jax.random.fold_in
    return jax.vmap(fold, (0, None))(key, number) if key.ndim else fold(key, number)


def draw(key: jax.Array, count: Any, sample: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`sample(key)` for each of `count` examples, from a key an example or from one key for all.

    count  an int, or the symbol of a batch of any size (`jax.export`).
    """
    return jax.vmap(sample)(key if key.ndim else jax.random.split(key, count))


class DropPath(NamedTuple):
    """Stochastic depth (Huang et al. 2016): an example's branch is left out with probability `rate`."""

    rate: Float[Array, ""] | float
    key: jax.Array

    def __call__(self, update: Tokens, branch: int) -> Tokens:
        """update [b n d] of branch 0 (attention) or 1 (MLP), scaled to keep its expectation."""
        keep = 1.0 - jnp.asarray(self.rate, jnp.float32)
        key = fold_key(self.key, branch)
        kept = draw(key, update.shape[0], lambda k: jax.random.bernoulli(k, keep, (1, 1)))
        return jnp.where(kept, update / keep.astype(update.dtype), 0)


def linear(config: ViTConfig, in_dim: int, out_dim: int, rngs: nnx.Rngs, **fields) -> nnx.Linear:
    """A linear layer that starts as the configuration says, with its dtypes."""
    init = nnx.initializers.normal(config.init_std)
    fields = {"kernel_init": init, "use_bias": True} | fields
    return nnx.Linear(
        in_dim, out_dim, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs, **fields
    )


def convolution(
    config: ViTConfig, in_dim: int, out_dim: int, size: int, rngs: nnx.Rngs, **fields
) -> nnx.Conv:
    """A square convolution with zero padding and the configuration's dtypes."""
    return nnx.Conv(
        in_dim, out_dim, (size, size), dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs,
        **fields,
    )  # fmt: skip


def fan_in_init(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default for the weights and the bias of a convolution: uniform within +-1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    uniform = nnx.initializers.uniform(2 * bound)
    return lambda *args: uniform(*args) - bound


def layer_norm(
    config: ViTConfig, rngs: nnx.Rngs, width: int = 0, epsilon: float = 0.0
) -> nnx.LayerNorm:
    """LayerNorm over `width` channels (0: the network's); its statistics are float32 whatever the compute dtype.

    epsilon  0: the network's.
    """
    return nnx.LayerNorm(
        width or config.embed_dim, epsilon=epsilon or config.norm_eps, dtype=config.dtype,
        param_dtype=config.param_dtype, rngs=rngs,
    )  # fmt: skip


class PatchEmbed(nnx.Module):
    """Images [b height width c] -> patch tokens [b patches d] in raster order.

    The strided convolution of timm, as a matrix product: `proj.kernel` is `[(row column channel), d]`.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        fan_in = config.patch_size**2 * config.in_chans
        init = fan_in_init(fan_in)
        self.patch_size = config.patch_size
        fields = {"kernel_init": init, "bias_init": init, "use_bias": config.patch_bias}
        self.proj = linear(config, fan_in, config.embed_dim, rngs, **fields)

    def __call__(self, images: Images) -> Tokens:
        b, height, width, c = images.shape
        p = self.patch_size
        # Pixels and channels of a patch's row are one axis from the start: XLA moves them in larger pieces.
        patches = images.reshape(b, height // p, p, width // p, p * c)
        patches = patches.transpose(0, 1, 3, 2, 4).reshape(b, -1, p * p * c)
        return self.proj(patches)


class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al. 2017): tokens [b n d] -> [b n d], and what `attention_fn` reports.

    With `config.attn_norm` what the projection reads is normalised over all heads together (EVA-02-CLIP).
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.num_heads = config.num_heads
        self.key_bias, self.rope = config.key_bias, config.rope
        self.qkv = linear(
            config, config.embed_dim, 3 * config.embed_dim, rngs, use_bias=config.qkv_bias
        )
        self.norm = layer_norm(config, rngs) if config.attn_norm else None
        self.proj = linear(config, config.embed_dim, config.embed_dim, rngs)

    def __call__(
        self,
        x: Tokens,
        attention_fn: AttentionFn = plain_attention,
        key_value: Float[Array, "b k d"] | None = None,
        rotary: Rotary | None = None,
        key_rotary: Rotary | None = None,
    ) -> tuple[Float[Array, "b q d"], Any]:
        """x [b n d] attends to `key_value` [b k d], or to itself: the result [b n d] (fewer rows where
        `attention_fn` gives fewer), and the report.

        rotary      positions of x, with which queries and keys are turned; a network without such positions has none.
        key_rotary  those of `key_value`.

        Raises ConfigError: the network has rotary positions, and none were given.
        """
        query, key, value = self._heads(x, key_value)
        key_rotary = rotary if key_value is None else key_rotary
        query, key = self._turned(query, rotary), self._turned(key, key_rotary)
        out, summary = attention_fn(query, key, value)
        return self._projected(out), summary

    def query_key(self, x: Tokens, rotary: Rotary | None = None) -> tuple[Queries, Keys]:
        """Queries and keys of x [b n d] alone, from which a method makes a map of its own, [b n h dh] each."""
        return self._turned(self._part(x, 0), rotary), self._turned(self._part(x, 1), rotary)

    def mix(self, x: Tokens, attn_map: AttnMap) -> Float[Array, "b q d"]:
        """The values of x [b n d], mixed by a given map [b h q n] and projected."""
        value = self._part(x, 2)
        return self._projected(mixed_values(attn_map, value))

    def _projected(self, mixed: Heads) -> Float[Array, "b q d"]:
        """The values that each head mixed, [b q h dh], joined, normalised where the network does so, and projected."""
        joined = mixed.reshape(*mixed.shape[:2], -1)
        return self.proj(self.norm(joined) if self.norm else joined)

    def _turned(self, heads: Heads, rotary: Rotary | None) -> Heads:
        """Queries or keys, turned by their tokens' positions in a network that has rotary ones."""
        if not self.rope:
            return heads
        if rotary is None:
            raise ConfigError(
                "this network has rotary positions: pass rotary=state.rotary where one of its blocks is run"
            )
        return turn(heads, rotary, neighbours=self.rope == "eva02")

    def _kernel_and_bias(self) -> tuple[Float[Array, "d e"], Float[Array, " e"] | None]:
        d, dtype = self.qkv.in_features, self.qkv.dtype
        kernel, bias = self.qkv.kernel[...].astype(dtype), None
        if self.qkv.bias is not None:
            bias = self.qkv.bias[...].astype(dtype)
            if not self.key_bias:
                bias = jnp.concatenate([bias[:d], jnp.zeros_like(bias[:d]), bias[2 * d :]])
        return kernel, bias

    def _part(self, x: Tokens, number: int) -> Heads:
        """Queries (0), keys (1) or values (2) of x [b n d]: [b n h dh]."""
        b, n, d = x.shape
        kernel, bias = self._kernel_and_bias()
        columns = slice(number * d, (number + 1) * d)
        own_bias = None if bias is None else bias[columns]
        (part,) = project(x.astype(kernel.dtype), kernel[:, columns], own_bias, 1)
        return part.reshape(b, n, self.num_heads, d // self.num_heads)

    def _heads(
        self, x: Tokens, key_value: Float[Array, "b k d"] | None
    ) -> tuple[Queries, Keys, Keys]:
        """Query, key and value of all heads, [b n h dh] each."""
        if key_value is not None:
            # Apart: there is no product of all three that XLA could find again.
            sources = (x, key_value, key_value)
            query, key, value = (self._part(source, i) for i, source in enumerate(sources))
            return query, key, value
        kernel, bias = self._kernel_and_bias()
        if kernel.dtype == jnp.bfloat16 or not self.key_bias:
            parts: Sequence[Any] = project(x.astype(kernel.dtype), kernel, bias, 3)
        else:
            parts = jnp.split(self.qkv(x), 3, axis=2)
        heads = self.num_heads, x.shape[2] // self.num_heads
        query, key, value = (part.reshape(*part.shape[:2], *heads) for part in parts)
        return query, key, value


def project(
    x: Tokens, kernel: Float[Array, "d e"], bias: Float[Array, " e"] | None, parts: int
) -> tuple[Tokens, ...]:
    """x [b n d] times kernel [d e] plus bias [e], cut into equal parts [b n e/parts].

    On a TPU backward has a product for each part, because to join the parts' gradients would copy them. The bias's
    gradient, a sum over all tokens, is a product with ones there: XLA joins no sum with the kernel before it. Sums are
    float32.
    """
    return tuple(_project(x, kernel, bias, parts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _project(x, kernel, bias, parts):
    out = x @ kernel
    return jnp.split(out if bias is None else out + bias[None, None], parts, axis=2)


def _project_forward(x, kernel, bias, parts):
    return _project(x, kernel, bias, parts), (x, kernel, bias)


def _project_backward(parts, arrays, grads):
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def together(x, kernel, bias, grads):
        grad = jnp.concatenate(grads, axis=2)
        of_bias = None if bias is None else grad.sum(axis=(0, 1), dtype=jnp.float32)
        return dot("bne,de->bnd", grad, kernel), dot("bnd,bne->de", x, grad), of_bias

    def apart(x, kernel, bias, grads):
        ones = jnp.ones((*x.shape[:2], SUBLANES), x.dtype)
        kernels = jnp.split(kernel, parts, axis=1)
        products = [dot("bne,de->bnd", g, w) for g, w in zip(grads, kernels, strict=True)]
        of_x = sum(products[1:], start=products[0])
        of_kernel = jnp.concatenate([dot("bnd,bne->de", x, g) for g in grads], axis=1)
        sums = [dot("bnk,bne->ke", ones, g)[0] for g in grads] if bias is not None else []
        return of_x, of_kernel, jnp.concatenate(sums) if sums else None

    found = by_platform(*arrays, grads, tpu=apart, default=together)
    return tuple(
        None if grad is None else grad.astype(array.dtype)
        for grad, array in zip(found, arrays, strict=True)
    )


_project.defvjp(_project_forward, _project_backward)


class Mlp(nnx.Module):
    """Two linear layers with a form of GELU between, or timm's packed SwiGLU (Shazeer 2020); [b n d] -> [b n d].

    With `config.mlp_norm` what the second layer reads is normalised (EVA-02).
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.kind = config.mlp
        hidden = config.mlp_dim
        self.fc1 = linear(config, config.embed_dim, hidden, rngs)
        out_of = hidden // 2 if self.kind == "swiglu" else hidden
        self.norm = layer_norm(config, rngs, out_of) if config.mlp_norm else None
        self.fc2 = linear(config, out_of, config.embed_dim, rngs)

    def __call__(self, x: Tokens) -> Tokens:
        x = self._activated(self.fc1(x))
        return self.fc2(self.norm(x) if self.norm else x)

    def _activated(self, x: Tokens) -> Float[Array, "b n h"]:
        if self.kind == "swiglu":
            gate, x = jnp.split(x, 2, axis=-1)
            return jax.nn.silu(gate) * x
        if self.kind == "quick_gelu":
            return quick_gelu(x)
        return jax.nn.gelu(x, approximate=True) if self.kind == "gelu_tanh" else gelu(x)


def quick_gelu(x: Tokens) -> Tokens:
    """The approximation of GELU in OpenAI's CLIP: `x` times the sigmoid of `1.702 x`."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU, `x` times the normal distribution's function of `x`; in bfloat16 an error of 3e-5 is added.

    A TPU has no instruction for erf and takes long to work it out. `x` times the sigmoid of this polynomial was fitted
    to GELU; the well-known form with tanh is .0005 from it.
    """
    if x.dtype != jnp.bfloat16:
        return jax.nn.gelu(x, approximate=False)
    wide = x.astype(jnp.float32)
    square = jnp.minimum(wide * wide, 25.0)  # beyond 5 the sigmoid is 0 or 1 in this precision
    slope = 1.594936 + square * (0.0740681 - 0.000710754 * square)
    return (wide * jax.nn.sigmoid(wide * slope)).astype(x.dtype)


class LayerScale(nnx.Module):
    """A learned factor a channel on a branch (Touvron et al. 2021, CaiT)."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.gamma = nnx.Param(
            jnp.full(config.embed_dim, config.layer_scale, dtype=config.param_dtype)
        )

    def __call__(self, x: Tokens) -> Tokens:
        return x * self.gamma[...].astype(x.dtype)[None, None]


@jax.custom_vjp
def row_major(x: Tokens) -> Tokens:
    """x [b n d], whose rows of channels a TPU is told to keep together in memory, as the kernels read them.

    Where XLA chooses for itself, it lets tokens and examples change places before some layers, and each time copies.
    """
    if x.dtype != jnp.bfloat16:
        return x
    layout = Layout(major_to_minor=(0, 1, 2))
    return by_platform(x, tpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x)


row_major.defvjp(lambda x: (row_major(x), None), lambda _, grad: (row_major(grad),))


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

    @jax.named_scope("attention")
    def attn_branch(
        self,
        x: Tokens,
        attention_fn: AttentionFn = plain_attention,
        key_value: Float[Array, "b k d"] | None = None,
        rotary: Rotary | None = None,
        key_rotary: Rotary | None = None,
    ) -> tuple[Float[Array, "b q d"], Any]:
        """The update [b n d] that attention adds to `x`, and what `attention_fn` reports.

        Keys and values come from `key_value` [b k d], or from `x` itself. Rotary positions as in `Attention`.
        """
        normed = None if key_value is None else self.norm1(key_value)
        update, summary = self.attn(self.norm1(x), attention_fn, normed, rotary, key_rotary)
        return self.ls1(update) if self.ls1 else update, summary

    @jax.named_scope("attention")
    def map_branch(self, x: Tokens, attn_map: AttnMap) -> Float[Array, "b q d"]:
        """The update [b q d] that attention by a given map [b h q n] adds; x [b n d] has the values."""
        update = self.attn.mix(self.norm1(x), attn_map)
        return self.ls1(update) if self.ls1 else update

    def finished(self, x: Tokens, update: Tokens, drop_path: DropPath | None = None) -> Tokens:
        """The tokens after the layer: x [b n d], the update of its attention, and the MLP."""
        x = x + (drop_path(update, 0) if drop_path else update)
        update = self.mlp_branch(x)
        return x + (drop_path(update, 1) if drop_path else update)

    @jax.named_scope("mlp")
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
        read: int | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Float[Array, "b m d"], Any]:
        """The tokens after the layer, and what `attention_fn` reports; `between` may change both on the way.

        read    how many of the first tokens are wanted: of the others the layer computes keys and values alone.
        rotary  the tokens' rotary positions, in a network that has some.
        """
        x = row_major(x)
        if read is None:
            update, summary = self.attn_branch(x, attention_fn, rotary=rotary)
        else:
            of_read = None if rotary is None else rotary.first(read)
            update, summary = self.attn_branch(x[:, :read], attention_fn, x, of_read, rotary)
            x = x[:, :read]
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


class AttentionPool(nnx.Module):
    """The head of SigLIP: one learned query reads all tokens, and an MLP follows; [b n d] -> [b d].

    Named as timm's `AttentionPoolLatent`. Source: google-research/big_vision, `models/vit.py` (`MAPHead`).
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        d = config.embed_dim
        self.num_heads = config.num_heads
        self.latent = nnx.Param(token_init(rngs.params(), (1, 1, d), config.param_dtype))
        self.q = linear(config, d, d, rngs)
        self.kv = linear(config, d, 2 * d, rngs)
        self.proj = linear(config, d, d, rngs)
        self.norm = layer_norm(config, rngs)
        self.mlp = Mlp(config, rngs=rngs)
        self.width, self.mlp_weights = d, config.mlp_weights

    def __call__(self, tokens: Tokens, weights: Scores | None = None) -> Float[Array, "b d"]:
        """`weights` [b n]: how often each token counts as a key; None: once."""
        b, n, d = tokens.shape
        heads = self.num_heads, d // self.num_heads
        latent = self.latent[...].astype(self.q.dtype)
        query = jnp.broadcast_to(self.q(latent), (b, 1, d)).reshape(b, 1, *heads)
        key, value = (x.reshape(b, n, *heads) for x in jnp.split(self.kv(tokens), 2, axis=2))
        logits = attention_logits(query, key)
        if weights is not None:
            logits += log_counts(weights)[:, None, None]
        attn_map = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        pooled = self.proj(mixed_values(attn_map, value).reshape(b, 1, d))
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]

    def macs(self, n: int) -> int:
        """Multiply-adds for one example of `n` tokens."""
        return 2 * (1 + n) * self.width**2 + 2 * n * self.width + self.mlp_weights
