"""The token selector of ToSA (arXiv 2406.08816): from attention logits of a layer it predicts the map of the next one.

In the paper it is two 1-D convolutions with a ReLU between, then a log-softmax. Here heads are the channels, and
kernels slide along the keys of a row. With kernels of width 1, the default, a selector fits every resolution.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tosa_jax.models.options import Options
from tosa_jax.models.vit_config import ViTConfig, check, check_choice
from tosa_jax.ops.array_types import AttnLogits, Keys, Queries
from tosa_jax.ops.attention import (
    NOT_READ,
    attention,
    attention_and_selector_sums,
    column_sums,
    is_read,
    walk_map,
)
from tosa_jax.ops.platforms import by_platform

_FEW_MACS = 200
"""Multiply-adds for an entry of the map. Up to this many, a CPU is faster entry by entry than by matrix products."""


@dataclass(frozen=True, kw_only=True)
class SelectorOptions(Options):
    """The size of the token selector. Raises ConfigError for values out of range.

    selector_hidden        channels between its two convolutions, at least 2 * num_heads; 0: that number.
    kernel_size            of its convolutions, in keys; odd.
    selector_query_stride  scores are summed over every so many-th query row of the predicted map, from the first one
                           on: 1, all rows, is the paper's; 2, 4 or 8 cost less and choose nearly the same tokens.
    """

    selector_hidden: int = 0
    kernel_size: int = 1
    selector_query_stride: int = 1

    def __post_init__(self) -> None:
        check_choice("selector_query_stride", self.selector_query_stride, (1, 2, 4, 8))
        check(self.kernel_size >= 1 and self.kernel_size % 2 == 1,
              f"kernel_size={self.kernel_size} must be odd")  # fmt: skip

    def check_network(self, config: ViTConfig) -> None:
        """Raise a ConfigError if there are too few channels for the heads of `config`."""
        least = 2 * config.num_heads
        check(self.selector_hidden == 0 or self.selector_hidden >= least,
              f"selector_hidden={self.selector_hidden} is below 2 * num_heads = {least}, which the "
              "selector's start at the identity needs; use 0 for that number")  # fmt: skip


def _identity_kernels(size: int, heads: int, hidden: int) -> tuple[Array, Array]:
    """Kernels [size h hidden] and [size hidden h] of the identity through a ReLU: `x = relu(x) - relu(-x)`."""
    expand = (
        jnp.zeros((size, heads, hidden))
        .at[size // 2, :, : 2 * heads]
        .set(jnp.concatenate([jnp.eye(heads), -jnp.eye(heads)], axis=1))
    )
    return expand, expand.transpose(0, 2, 1)


class HeadConv(nnx.Module):
    """A 1-D convolution along the keys with heads as channels and zero padding: [b h q k] -> [b f q k]."""

    def __init__(self, kernel: Float[Array, "size h f"], config: ViTConfig) -> None:
        self.kernel = nnx.Param(kernel.astype(config.param_dtype))
        self.bias = nnx.Param(jnp.zeros(kernel.shape[-1], config.param_dtype))

    def __call__(self, x: Float[Array, "b h q k"]) -> Float[Array, "b f q k"]:
        kernel = self.kernel[...].astype(x.dtype)
        size, keys = len(kernel), x.shape[-1]
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (size // 2, size // 2))) if size > 1 else x
        taps = [
            jnp.einsum("bhqk,hf->bfqk", padded[..., i : i + keys], kernel[i]) for i in range(size)
        ]
        return sum(taps) + self.bias[...].astype(x.dtype)[None, :, None, None]


class TokenSelector(nnx.Module):
    """Predicts the attention map of the next layer. It starts as the identity: it then predicts the given map."""

    def __init__(self, config: ViTConfig) -> None:
        options = config.options_of(SelectorOptions)
        size, hidden = options.kernel_size, options.selector_hidden or 2 * config.num_heads
        expand, contract = _identity_kernels(size, config.num_heads, hidden)
        if (extra := hidden - 2 * config.num_heads) > 0:
            # More channels than the identity needs start with random weights in and zeros out, so that the whole is
            # still the identity, and they can be trained.
            key = jax.random.key(0)
            noise = jax.random.normal(key, (size, config.num_heads, extra))
            expand = expand.at[:, :, -extra:].set(noise * config.num_heads**-0.5)
        self.conv1 = HeadConv(expand, config)
        self.conv2 = HeadConv(contract, config)
        self.macs_per_entry = 2 * size * config.num_heads * hidden
        self.size, self.hidden = size, hidden
        self.query_stride = options.selector_query_stride

    def layers(self) -> tuple[Array, Array, Array]:
        """Kernel [h f] and bias [f], then kernel [f h], of a selector of width 1.

        The second bias is the same for all keys of a row, and log-softmax takes it out again.
        """
        return self.conv1.kernel[...][0], self.conv1.bias[...], self.conv2.kernel[...][0]

    @jax.named_scope("selector")
    def __call__(
        self, logits: AttnLogits, read: Bool[Array, "b k"] | None = None
    ) -> Float[Array, "b h q k"]:
        """Scaled attention logits, float32 -> the logarithm of the predicted map; its rows sum to 1 over the keys.

        read  [b k], the keys that there are: others are as zeros beside the map, and are paid nothing. None: all.

        No gradient goes back to the logits: a loss on the prediction does not train the layer that they come from.
        """
        logits = jax.lax.stop_gradient(logits)
        there = None if read is None else read[:, None, None]
        if there is not None:
            logits = jnp.where(there, logits, 0)
        if self.macs_per_entry > _FEW_MACS or self.size > 1:
            found = self._convolve(logits)
        else:
            found = by_platform(logits, cpu=self._mix_heads, default=self._convolve)
        found = found if there is None else jnp.where(there, found, NOT_READ)
        return jax.nn.log_softmax(found, axis=-1)

    def attention_and_sums(
        self,
        query: Queries,
        key: Keys,
        value: Keys,
        chunk: int | None = None,
        key_bias: Float[Array, "b k"] | None = None,
    ) -> tuple[Queries, Float[Array, "b h k"]]:
        """Attention of a layer, and the column sums of the map that is predicted for the next one, float32 [b h k].

        They go over the rows that the selector reads, and no gradient passes through them. Arguments are those of
        `ops.attention.attention_and_column_sums`.
        """

        read = None if key_bias is None else is_read(key_bias)

        def summarise(logits, attn_map, counts):
            # Probabilities are summed, not their logarithms, which would be ruled by the smallest ones.
            return column_sums(jnp.exp(self(logits, read)), counts)

        def walked(query, key, value, *_):
            rows = query[:, :: self.query_stride]
            counts = None if read is None else read[:, :: self.query_stride].astype(jnp.float32)
            out, sums = walk_map(
                rows, key, value, summarise, rows=counts, chunk=chunk, key_bias=key_bias
            )
            out = out if self.query_stride == 1 else attention(query, key, value, key_bias)
            return out, jax.lax.stop_gradient(sums)

        if self.size > 1 or key_bias is not None:
            return walked(query, key, value)
        layers, stride = self.layers(), self.query_stride
        return attention_and_selector_sums(query, key, value, layers, walked, stride)

    def _convolve(self, logits: AttnLogits) -> AttnLogits:
        return self.conv2(jax.nn.relu(self.conv1(logits)))

    def _mix_heads(self, logits: AttnLogits) -> AttnLogits:
        """The same as `_convolve` for kernels of width 1, entry by entry: a CPU makes one loop of it without copies."""

        def mixed(heads, conv):
            kernel, bias = (x[...].astype(logits.dtype) for x in (conv.kernel, conv.bias))
            return [
                sum(weight * x for weight, x in zip(kernel[0, :, f], heads, strict=True)) + bias[f]
                for f in range(len(bias))
            ]

        hidden = mixed([logits[:, i] for i in range(logits.shape[1])], self.conv1)
        return jnp.stack(mixed([jax.nn.relu(x) for x in hidden], self.conv2), axis=1)

    def macs(self, n: int) -> int:
        """Multiply-adds for the scores of one example of `n` tokens."""
        return self.macs_per_entry * n * math.ceil(n / self.query_stride)
