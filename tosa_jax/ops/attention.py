"""Attention in pure functions: the fused form, and the walk over a map that somebody reads.

No function here returns an attention map: what is wanted of it is summed up on the way.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from tosa_jax.ops import gpu_attention, tpu_attention
from tosa_jax.ops.array_types import AttnLogits, AttnMap, Heads, Keys, PerExample, Queries, Scores
from tosa_jax.ops.platforms import by_platform

NOT_READ = float(jnp.finfo(jnp.float32).min)
"""The bias of a key that no query reads."""


def is_read(key_bias: Float[Array, "b k"]) -> Bool[Array, "b k"]:
    """Which tokens are read as keys, by their bias."""
    return key_bias > NOT_READ / 2


def pool_heads(values: Float[Array, "b h n"], how: str) -> Scores:
    """One value a token from one a head; `how` is "mean" or "max"."""
    return {"mean": jnp.mean, "max": jnp.max}[how](values, axis=1)


def column_sums(
    attn_map: AttnMap, rows: Float[Array, "b q"] | Int[Array, "b q"] | None = None
) -> Float[Array, "b h k"]:
    """How much attention each token is paid by these query rows, each counted `rows` [b q] times; None: once."""
    return (attn_map if rows is None else attn_map * rows[:, None, :, None]).sum(axis=2)


def attention(
    query: Queries, key: Keys, value: Keys, key_bias: Float[Array, "b k"] | None = None
) -> Queries:
    """Softmax attention whose map nobody reads; logits and softmax in float32.

    `key_bias` is added to every logit of a key. In half precision the program compiled for a TPU is a kernel where the
    shapes fit (`ops.tpu_attention`). One for an NVIDIA GPU is a kernel or cuDNN's where there is no bias
    (`ops.gpu_attention`).
    """
    bias = () if key_bias is None else (key_bias,)
    forms = {}
    if tpu_attention.supports(query, key):
        forms["tpu"] = tpu_attention.attention
    if key_bias is None and gpu_attention.is_narrow(query) and _has_cuda():
        short = gpu_attention.is_short(query, key)
        forms["cuda"] = gpu_attention.attention if short else gpu_attention.cudnn_attention
    if not forms:
        return _xla_attention(query, key, value, *bias)
    return by_platform(query, key, value, *bias, **forms, default=_xla_attention)


def _xla_attention(query, key, value, key_bias=None):
    """As `jax.nn.dot_product_attention`, which leaves heads between each other: see `_heads_first`."""
    logits = _biased(attention_logits(query, key), key_bias)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    # To divide what is mixed, and not the map, leaves out a walk over the map.
    mixed = _mixed(weights, value, jnp.float32) / weights.sum(axis=-1, keepdims=True)
    return mixed.transpose(0, 2, 1, 3).astype(query.dtype)


def _heads_first(x: Heads) -> Float[Array, "b h n c"]:
    """x [b n h c], whose heads XLA for CPUs is made to put together in memory.

    It multiplies the matrices of heads that lie between each other at a third of the speed.
    """

    def copied(x):
        return jax.lax.optimization_barrier(x.transpose(0, 2, 1, 3))

    return by_platform(x, cpu=copied, default=lambda x: x.transpose(0, 2, 1, 3))


def mixed_values(attn_map: AttnMap, value: Keys) -> Queries:
    """The values [b k h c], mixed by each row of a map [b h q k]: [b q h c]."""
    return _mixed(attn_map, value, value.dtype).transpose(0, 2, 1, 3)


def _mixed(weights, value, dtype):
    weights, value = weights.astype(value.dtype), _heads_first(value)
    return jnp.einsum("bhqk,bhkc->bhqc", weights, value, preferred_element_type=dtype)


@functools.cache
def _has_cuda() -> bool:
    """Whether this process has NVIDIA GPUs, of the kinds that these kernels and cuDNN's need: Ampere or later."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return False
    return all(float(device.compute_capability) >= 8 for device in devices)


def attention_logits(query: Queries, key: Keys) -> AttnLogits:
    """Scaled attention logits `q k^T / sqrt(dh)` in float32."""
    scale = query.shape[-1] ** -0.5
    query, key = _heads_first(query), _heads_first(key)
    return scale * jnp.einsum("bhqc,bhkc->bhqk", query, key, preferred_element_type=jnp.float32)


def attention_and_map(
    query: Queries, key: Keys, value: Keys, key_bias: Float[Array, "b k"] | None = None
) -> tuple[Queries, AttnMap]:
    """Attention, and its whole map [b h q k], float32: for people to look at."""
    attn_map = jax.nn.softmax(_biased(attention_logits(query, key), key_bias), axis=-1)
    return mixed_values(attn_map, value), attn_map


def first_row(
    query: Queries, key: Keys, key_bias: Float[Array, "b k"] | None = None
) -> Float[Array, "b h k"]:
    """The map's row of the first token, the class token where there is one; float32. `key_bias` as in `attention`."""
    logits = _biased(attention_logits(query[:, :1], key), key_bias)
    return jax.nn.softmax(logits[:, :, 0], axis=-1)


def _biased(logits: AttnLogits, key_bias: Float[Array, "b k"] | None) -> AttnLogits:
    return logits if key_bias is None else logits + key_bias[:, None, None]


def walk_map(
    query: Queries,
    key: Keys,
    value: Keys,
    summarise: Callable[[AttnLogits, AttnMap, Any], PyTree],
    *,
    rows: PyTree = None,
    chunk: int | None = None,
    key_bias: Float[Array, "b k"] | None = None,
) -> tuple[Queries, PyTree]:
    """Exact attention, and a sum over its map, without the map ever leaving this function.

    The walk goes over query rows in chunks. `summarise(logits, attn_map, rows)` sees the float32 logits and map
    `[b h q k]` of a chunk with the same rows of `rows` (a tree of `[b n ...]`), and returns a tree of arrays
    that are added up over the chunks. Memory is `h * chunk * n` an example, also backward, where each chunk
    is computed again (Rabe and Staats 2021, arXiv 2112.05682); `chunk=None` takes all rows at once and recomputes
    nothing. `key_bias` is added to the logits, as in `attention`.
    """

    def step(query_rows, other_rows):
        logits = _biased(attention_logits(query_rows, key), key_bias)
        attn_map = jax.nn.softmax(logits, axis=-1)
        return mixed_values(attn_map, value), summarise(logits, attn_map, other_rows)

    num_rows = query.shape[1]
    if chunk is None or chunk >= num_rows:
        return step(query, rows)

    step = jax.checkpoint(step)
    full = num_rows // chunk * chunk

    def split(x):
        chunks = x[:, :full].reshape(x.shape[0], full // chunk, chunk, *x.shape[2:])
        return jnp.moveaxis(chunks, 1, 0)

    def body(total, chunk_rows):
        out, part = step(*chunk_rows)
        return jax.tree.map(jnp.add, total, part), out

    head = jax.tree.map(split, (query, rows))
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda: step(*jax.tree.map(lambda x: x[0], head))[1]),
    )
    total, out = jax.lax.scan(body, zeros, head)
    out = jnp.moveaxis(out, 0, 1).reshape(query.shape[0], full, *query.shape[2:])
    if full < num_rows:
        tail, part = step(*jax.tree.map(lambda x: x[:, full:], (query, rows)))
        out = jnp.concatenate([out, tail], axis=1)
        total = jax.tree.map(jnp.add, total, part)
    return out, total


def attention_and_column_sums(
    query: Queries,
    key: Keys,
    value: Keys,
    chunk: int | None = None,
    key_bias: Float[Array, "b k"] | None = None,
) -> tuple[Queries, Float[Array, "b h k"]]:
    """Attention, and how much of it each token is paid, float32 [b h k]; no gradient passes through the sums.

    Tokens that are not read as keys (`is_read`) do not count as queries either. A kernel where the program is compiled
    for a TPU or an NVIDIA GPU, the shapes fit, and there is no bias of the keys; else the walk, `chunk` query rows at a
    time.
    """

    def walked(query, key, value):
        counts = None if key_bias is None else is_read(key_bias).astype(jnp.float32)
        out, sums = walk_map(
            query, key, value, lambda _, attn_map, rows: column_sums(attn_map, rows), rows=counts,
            chunk=chunk, key_bias=key_bias,
        )  # fmt: skip
        return out, jax.lax.stop_gradient(sums)

    forms = {}
    if tpu_attention.supports(query, key):
        forms["tpu"] = tpu_attention.attention_and_column_sums
    if gpu_attention.is_short(query, key) and _has_cuda():
        forms["cuda"] = gpu_attention.attention_and_column_sums
    if not forms or key_bias is not None:
        return walked(query, key, value)
    return by_platform(query, key, value, **forms, default=walked)


def attention_and_selector_sums(
    query: Queries,
    key: Keys,
    value: Keys,
    layers: tuple[Array, Array, Array],
    walked: Callable[..., tuple[Queries, Float[Array, "b h k"]]],
    stride: int = 1,
) -> tuple[Queries, Float[Array, "b h k"]]:
    """Attention, and how much each token is paid in the map that a selector of width 1 predicts, float32 [b h k].

    A kernel where the program is compiled for a TPU or an NVIDIA GPU and the shapes fit; else `walked(query, key,
    value, *layers)`, which is the same by XLA.

    layers  of the selector: kernel [h f], bias [f], kernel [f h].
    stride  the selector reads every stride-th row of the map, from the first one on; its sums are of these rows.
    """

    def form(kernels):
        return lambda *arrays: kernels.attention_and_selector_sums(*arrays, stride)

    forms = {}
    if tpu_attention.supports_selector(query, key, layers[0].shape[1], stride):
        forms["tpu"] = form(tpu_attention)
    if gpu_attention.supports_selector(query, key) and _has_cuda():
        forms["cuda"] = form(gpu_attention)
    arrays = query, key, value, *layers
    return by_platform(*arrays, **forms, default=walked) if forms else walked(*arrays)


def map_kl(true_logits: AttnLogits, log_predicted: Float[Array, "b h q k"]) -> PerExample:
    """Forward KL in nats from a true attention map, given by its logits, to the log of a predicted one.

    Mean over heads, summed over the query rows given.
    """
    log_true = jax.nn.log_softmax(true_logits, axis=-1)
    divergence = (jnp.exp(log_true) * (log_true - log_predicted)).sum(axis=-1)
    return divergence.mean(axis=1).sum(axis=-1)
