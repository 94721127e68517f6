"""Attention on an NVIDIA GPU: kernels for short sequences and for what a token selector reads, and cuDNN's.

A kernel of attention has one head of an example: its keys stay in the chip's fast memory while tiles of query rows pass
by, so softmax needs no second pass. It reads queries, keys and values as one projection wrote them, where cuDNN wants
three arrays. It can report the column sums of the map, or its logits. cuDNN takes longer sequences and every backward
pass; it hands out nothing of its map, and a kernel of its own then writes the logits.

A selector reads logits in half precision, once: it mixes the heads of a row in a product of matrices, takes softmax,
and adds up the rows. Logits lie as `[b q heads keys]`, so that the heads of a row, or of several rows where there are
few, are the rows of a matrix. Keys and heads are padded to whole blocks.

`ops.attention` calls these functions and holds the same mathematics for XLA, which is the reference that tests compare
with. The kernels are Pallas's for Triton (`ops.gpu_kernels`); how they were cut was chosen by measurement on an H200.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from tosa_jax.ops.array_types import Keys, Queries
from tosa_jax.ops.gpu_kernels import (
    UNIT,
    Heads,
    attention_kernel,
    for_steps,
    logits_kernel,
    padded,
    selector_kernel,
)
from tosa_jax.ops.partitioning import divide

_ROWS = 64
"""Query rows of a tile of attention: four warps with 16 rows each, whose softmax then needs no other warp."""

_TILE = 128
"""Rows, and at most as many keys, of a tile of logits."""

_STEPS = 25
"""Steps of a program that adds up a selector's map."""

_REGISTERS = 24_000
"""Entries of a selector's map that a program may hold, beside as many sums."""


class Cut(NamedTuple):
    """How logits are laid out for a selector, and read.

    widths  of the pieces that a row of keys is read in; they reach beyond its end.
    heads   rows of the matrix for a query row: the number of heads, rounded up to a power of two.
    slots   rows of the matrix of a step: those of `slots // heads` query rows.
    """

    widths: tuple[int, ...]
    heads: int
    slots: int

    @classmethod
    def of(cls, keys: int, heads: int) -> "Cut":
        """How to cut maps of `keys` keys and `heads` heads."""
        return cls(pieces(keys, 64, 512, 2), pl.next_power_of_2(heads), padded(heads, UNIT))

    @property
    def keys(self) -> int:
        """Keys of a row, with those beyond its end."""
        return sum(self.widths)


def pieces(count: int, least: int, largest: int, most: int) -> tuple[int, ...]:
    """Powers of two from `least` to `largest` that cover `count`, at most `most` of them below `largest`."""
    total = pl.cdiv(count, least) * least
    while (total % largest).bit_count() > most:
        total += total & -total
    smaller = [largest >> i for i in range(1, largest.bit_length())]
    return (largest,) * (total // largest) + tuple(x for x in smaller if total % largest & x)


def is_narrow(query: Queries) -> bool:
    """Whether the arrays are in half precision, with a number of channels a head that cuDNN takes."""
    channels = query.shape[-1]
    return query.dtype in (jnp.bfloat16, jnp.float16) and channels % 8 == 0 and channels <= 128


def is_short(query: Queries, key: Keys) -> bool:
    """Whether the kernel of attention takes these arrays: up to 256 keys, 16 to 64 channels a head."""
    return is_narrow(query) and UNIT <= query.shape[-1] <= 64 and key.shape[1] <= 256


def supports_selector(query: Queries, key: Keys) -> bool:
    """Whether a selector of width 1 can read logits of these arrays in a kernel: a row of them fits in registers."""
    cut = Cut.of(key.shape[1], query.shape[2])
    return is_narrow(query) and query.shape[-1] >= UNIT and cut.keys * cut.slots <= _REGISTERS


# cuDNN ----------------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def cudnn_attention(query: Queries, key: Keys, value: Keys) -> Queries:
    """Attention by cuDNN's kernels, for arrays that `is_narrow`; only where CUDA is installed."""
    return _cudnn(query, key, value)


def _cudnn(query, key, value, **lengths):
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn", **lengths)


def _cudnn_of_even(query, key, value):
    """The same for training, where JAX calls cuDNN for even numbers of tokens alone."""
    counts = query.shape[1], key.shape[1]
    if not any(count % 2 for count in counts):
        return _cudnn(query, key, value)
    of_queries, of_keys = (jnp.full(query.shape[0], count, jnp.int32) for count in counts)
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value)
    )
    out = _cudnn(query, key, value, query_seq_lengths=of_queries, key_value_seq_lengths=of_keys)
    return out[:, : counts[0]]


def _training(query, key, value):
    return jax.vjp(_cudnn_of_even, query, key, value)


def _pull(pullback, grad):
    return pullback(grad)


cudnn_attention.defvjp(_training, _pull)


# Attention of short sequences -----------------------------------------------------------------------------------------


@jax.custom_vjp
def attention(query: Queries, key: Keys, value: Keys) -> Queries:
    """`ops.attention.attention` without a bias, for arrays that `is_short` names; its backward pass is cuDNN's."""
    return _divided_attention("")(query, key, value)[0]


attention.defvjp(_training, _pull)


@jax.custom_vjp
def attention_and_column_sums(
    query: Queries, key: Keys, value: Keys
) -> tuple[Queries, Float[Array, "b h k"]]:
    """`ops.attention.attention_and_column_sums` for the same arrays. No gradient passes through the sums."""
    out, sums = _divided_attention("sums")(query, key, value)
    return out, sums


def _sums_forward(query, key, value):
    out, pullback = _training(query, key, value)
    return (out, _divided_attention("sums")(query, key, value)[1]), pullback


attention_and_column_sums.defvjp(_sums_forward, lambda pullback, grads: pullback(grads[0]))


@functools.cache
def _divided_attention(report: str) -> Callable:
    reported = {"": "", "sums": ", b h k", "logits": ", b q r s"}[report]
    rule = f"b q h c, b k h c, b k h c -> b q h c{reported}"
    whole = ("q", "c", "k", *(("h", "r", "s") if report == "logits" else ()))
    return divide(functools.partial(_attention, report=report), rule, whole)


def _attention(query, key, value, report):
    """Attention, and what it reports, on the arrays of one device."""
    b, queries, heads, channels = query.shape
    keys, cut = key.shape[1], Cut.of(key.shape[1], heads)
    arrays, firsts = [x.reshape(*x.shape[:2], -1) for x in (query, key, value)], (0, 0, 0)
    if queries == keys:
        # They were cut out of one product, and XLA sees that together they are that product again: no copy.
        width = heads * channels
        arrays, firsts = [jnp.concatenate(arrays, axis=2)] * 3, (0, width, 2 * width)
    shapes = [jax.ShapeDtypeStruct((b, queries, heads * channels), query.dtype)]
    if report == "sums":
        shapes.append(jax.ShapeDtypeStruct((b, heads * cut.keys), jnp.float32))
    if report == "logits":
        shapes.append(jax.ShapeDtypeStruct((b, queries, cut.heads * cut.keys), jnp.float16))
    kernel = functools.partial(
        attention_kernel,
        sizes=Heads(queries, keys, channels), rows=_ROWS, widths=pieces(keys, UNIT, 256, 3),
        firsts=firsts, stride=cut.keys, report=report,
    )  # fmt: skip
    out, *reports = _call(kernel, "attention", (b, heads), arrays, shapes, warps=4, stages=2)
    out = out.reshape(query.shape)
    if report == "sums":
        return out, reports[0].reshape(b, heads, cut.keys)[:, :, :keys]
    return out, *(x.reshape(b, queries, cut.heads, cut.keys) for x in reports)


def _call(kernel, name, grid, arrays, shapes, *, warps, stages):
    """Calls a kernel whose programs each have one example, its whole arrays in and out."""

    def of_example(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda i, *_: (i, *[0] * (len(x.shape) - 1)))

    return pl.pallas_call(
        kernel, grid=grid, in_specs=list(map(of_example, arrays)),
        out_specs=list(map(of_example, shapes)), out_shape=shapes, name=name,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
    )(*arrays)  # fmt: skip


# What a selector reads ------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def attention_and_selector_sums(
    query: Queries,
    key: Keys,
    value: Keys,
    expand: Float[Array, "h f"],
    expand_bias: Float[Array, " f"],
    contract: Float[Array, "f h"],
    stride: int = 1,
) -> tuple[Queries, Float[Array, "b h k"]]:
    """Attention, and the column sums [b h k] of the map that a selector of width 1 predicts from its logits.

    For arrays that `supports_selector` names. The selector reads every stride-th row of the logits, mixes heads in half
    precision and adds up in float32; no gradient passes through the sums.
    """
    if is_short(query, key) and stride == 1:
        out, logits = _divided_attention("logits")(query, key, value)
    else:
        plain = attention if is_short(query, key) else cudnn_attention
        out = plain(query, key, value)
        logits = _divided_logits()(query[:, ::stride], key)
    return out, _divided_sums(key.shape[1])(logits, expand, expand_bias, contract)


def _selected_forward(query, key, value, expand, expand_bias, contract, stride):
    layers = expand, expand_bias, contract
    out, pullback = _training(query, key, value)
    logits = _divided_logits()(query[:, ::stride], key)
    return (out, _divided_sums(key.shape[1])(logits, *layers)), (pullback, layers)


def _selected_backward(stride, arrays, grads):
    pullback, layers = arrays
    return (*pullback(grads[0]), *map(jnp.zeros_like, layers))


attention_and_selector_sums.defvjp(_selected_forward, _selected_backward)


@functools.cache
def _divided_logits() -> Callable:
    return divide(_logits, "b q h c, b m h c -> b q r s", ("q", "h", "c", "m", "r", "s"))


@functools.cache
def _divided_sums(keys: int) -> Callable:
    """A selector mixes heads: they are not divided."""
    call = functools.partial(_selector_sums, keys=keys)
    rule = "b q r s, h f, f, f h -> b h k"
    return divide(call, rule, ("q", "r", "s", "h", "f", "k"))


def _logits(query, key):
    """Scaled logits, float16 [b q heads keys], both padded; of padded heads nothing is written."""
    b, queries, heads, channels = query.shape
    keys, cut = key.shape[1], Cut.of(key.shape[1], heads)
    width = min(_TILE, cut.widths[-1])
    kernel = functools.partial(
        logits_kernel,
        sizes=Heads(queries, keys, channels), rows=_TILE, width=width, stride=cut.keys,
    )  # fmt: skip
    arrays = [x.reshape(*x.shape[:2], -1) for x in (query, key)]
    shapes = [jax.ShapeDtypeStruct((b, queries, cut.heads * cut.keys), jnp.float16)]
    grid = b, heads, pl.cdiv(queries, _TILE) * (cut.keys // width)
    (logits,) = _call(kernel, "attention_logits", grid, arrays, shapes, warps=8, stages=1)
    return logits.reshape(b, queries, cut.heads, cut.keys)


def _selector_sums(logits, expand, expand_bias, contract, keys):
    """The column sums [b h keys] of the predicted map, on the arrays of one device."""
    b, queries, block, width = logits.shape
    heads = len(expand)
    cut = Cut.of(keys, heads)
    layers = for_steps(expand, expand_bias, contract, block, cut.slots)
    programs = pl.cdiv(queries * block, cut.slots * _STEPS)
    kernel = functools.partial(
        selector_kernel,
        queries=queries, keys=keys, heads=heads, block=block, slots=cut.slots, steps=_STEPS,
        widths=cut.widths,
    )  # fmt: skip
    found = pl.pallas_call(
        kernel,
        grid=(b, programs),
        in_specs=[
            pl.BlockSpec((None, queries * block, width), lambda i, t: (i, 0, 0)),
            *(pl.BlockSpec(x.shape, lambda *_, x=x: (0,) * x.ndim) for x in layers),
        ],
        out_specs=pl.BlockSpec((None, None, cut.slots, width), lambda i, t: (i, t, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((b, programs, cut.slots, width), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4 if width <= 256 else 8, num_stages=3),
        name="selector_sums",
    )(logits.reshape(b, -1, width), *layers)
    return found.reshape(b, -1, block, width).sum(axis=1)[:, :heads, :keys]
