"""Attention of short sequences as TPU kernels: a whole row of the map stays in the chip's fast memory.

Queries, keys and values are read as `[b n d]`, as the projections write them, and heads are cut out of the lanes inside
the kernel: XLA's own form copies them into other layouts before and after. A grid step has one example, a block of
heads and a tile of query rows; the keys of an example are never tiled, so softmax needs no second pass. Backward
computes the map again from queries and keys.

`supports` says which shapes fit. `ops.attention` calls these kernels and holds the same mathematics for XLA, which is
the reference that tests compare with.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tosa_jax.ops.array_types import Keys, Queries
from tosa_jax.ops.partitioning import divide
from tosa_jax.ops.tpu_kernels import (
    LANES,
    SUBLANES,
    backward_kernel,
    forward_kernel,
    mixed_rows,
    stride_memory,
)

# Bytes a grid step may hold; a TPU core's kernels may have 16 MiB without asking.
_VMEM = 12 * 2**20

# A grid step's heads are unrolled: more of them make a larger program, and overlap no better.
_MOST_HEADS = 8


class Blocks(NamedTuple):
    """How the work is cut: `heads` and query `rows` a grid step."""

    heads: int
    rows: int


def blocks(queries: int, keys: int, heads: int, head_dim: int) -> Blocks | None:
    """The largest blocks that fit a TPU's fast memory; None where none do.

    queries, keys  tokens of an example; `heads` of `head_dim` channels.
    """
    allowed = [
        count
        for count in range(min(heads, _MOST_HEADS), 0, -1)
        if heads % count == 0 and (count * head_dim % LANES == 0 or count == heads)
    ]
    for tiles in range(1, 1 + math.ceil(queries / 16)):
        rows = queries if tiles == 1 else _round_up(math.ceil(queries / tiles), 16)
        for count in allowed:
            if _bytes(rows, keys, count, head_dim) <= _VMEM:
                return Blocks(count, rows)
    return None


def _bytes(rows: int, keys: int, heads: int, head_dim: int) -> int:
    """Bytes that a grid step holds, forward or backward."""
    width = _round_up(heads * head_dim, LANES)
    # Each operand twice, because the next step's is fetched meanwhile; sums over the tiles in float32.
    operands = 2 * 2 * width * (3 * rows + 4 * keys) + 4 * 2 * width * keys
    # Forward keeps logits and weights of all heads at once.
    return operands + 2 * 4 * heads * _round_up(rows, 8) * _round_up(keys, LANES)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def selector_blocks(
    queries: int, keys: int, heads: int, head_dim: int, hidden: int, stride: int = 1
) -> Blocks | None:
    """Blocks where a selector reads the logits: all heads, because it mixes them, and whole groups of rows.

    hidden  channels between the selector's layers.
    stride  it reads every stride-th row; a divisor of 8, so that every tile begins with a row that is read.
    """
    width, together = _round_up(heads * head_dim, LANES), mixed_rows(heads)
    for tiles in range(1, 1 + math.ceil(queries / together)):
        rows = _round_up(math.ceil(queries / tiles), together)
        # Operands twice; logits, their rounded copy and weights; what a group of rows is mixed into, and the matrices
        # that mix it.
        operands = 2 * 2 * width * 2 * (rows + keys)
        mixed = together * (4 * heads + 6 * hidden)
        maps = _round_up(keys, LANES) * (10 * heads * rows + mixed)
        operands += 2 * 2 * 2 * together**2 * heads * hidden
        if stride > 1:
            maps += 4 * math.prod(stride_memory(heads, rows, keys, stride))
        if operands + maps <= _VMEM:
            return Blocks(heads, rows)
    return None


def supports(query: Queries, key: Keys) -> bool:
    """Whether a kernel takes these arrays: bfloat16, at least 32 channels a head and 8 queries, blocks that fit."""
    heads, head_dim = query.shape[2:]
    fits = blocks(query.shape[1], key.shape[1], heads, head_dim)
    large = head_dim >= 32 and query.shape[1] >= SUBLANES
    return query.dtype == jnp.bfloat16 and large and fits is not None


def supports_selector(query: Queries, key: Keys, hidden: int, stride: int = 1) -> bool:
    """Whether a kernel takes these arrays and a selector of width 1 with `hidden` channels between its layers."""
    _, keys, heads, head_dim = key.shape
    fits = selector_blocks(query.shape[1], keys, heads, head_dim, hidden, stride)
    return supports(query, key) and fits is not None and SUBLANES % stride == 0


# Calls of the kernels, on the arrays of one device -------------------------------------------------------------------


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], -1)


class _Call(NamedTuple):
    """What every call of a kernel shares."""

    grid: tuple[int, int, int]
    blocks: Blocks
    tile: pl.BlockSpec
    whole: pl.BlockSpec
    operands: tuple[jax.Array, ...]
    specs: tuple[pl.BlockSpec, ...]
    fields: dict

    @classmethod
    def of(cls, query: Queries, key: Keys, value: Keys, biased: bool, *selector: int) -> "_Call":
        """`selector` has, where there is one, the last arguments of `selector_blocks`."""
        b, queries, heads, head_dim = query.shape
        shape = queries, key.shape[1], heads, head_dim
        size = selector_blocks(*shape, *selector) if selector else blocks(*shape)
        assert size is not None, "`supports` was asked before"
        width = size.heads * head_dim
        grid = (b, heads // size.heads, -(-queries // size.rows))
        fields = {
            "head_dim": head_dim, "heads": size.heads, "queries": queries, "biased": biased,
        }  # fmt: skip
        tile = pl.BlockSpec((1, size.rows, width), lambda i, h, t: (i, t, h))
        whole = pl.BlockSpec((1, key.shape[1], width), lambda i, h, t: (i, 0, h))
        operands, specs = tuple(map(_flat, (query, key, value))), (tile, whole, whole)
        if queries == key.shape[1] and width % LANES == 0:
            # They were cut out of one product, and XLA sees that together they are that product again: no copy.
            operands = (jnp.concatenate(operands, axis=2),) * 3
            count = heads // size.heads
            specs = (
                tile,
                pl.BlockSpec(whole.block_shape, lambda i, h, t: (i, 0, count + h)),
                pl.BlockSpec(whole.block_shape, lambda i, h, t: (i, 0, 2 * count + h)),
            )
        return cls(grid, size, tile, whole, operands, specs, fields)

    @property
    def order(self) -> pltpu.CompilerParams:
        return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _forward(query, key, value, *bias, summed: bool, mixing: tuple[jax.Array, ...] = (), stride=0):
    b, queries, heads, _ = query.shape
    selector = (len(mixing[0]) // mixed_rows(heads), stride) if mixing else ()
    call = _Call.of(query, key, value, bool(bias), *selector)
    keys, block = key.shape[1], call.blocks.heads
    in_specs = list(call.specs)
    if bias:
        in_specs.append(pl.BlockSpec((1, 1, keys), lambda i, h, t: (i, 0, 0)))
    in_specs += [pl.BlockSpec(x.shape, lambda i, h, t: (0, 0)) for x in mixing]
    out_specs, out_shape = [call.tile], [jax.ShapeDtypeStruct(_flat(query).shape, query.dtype)]
    if summed:
        out_specs.append(pl.BlockSpec((1, 1, block, keys), lambda i, h, t: (i, h, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((b, heads // block, block, keys), jnp.float32))
    memory = [stride_memory(heads, call.blocks.rows, keys, stride)] if stride > 1 else []
    out, *sums = pl.pallas_call(
        functools.partial(forward_kernel, summed=summed, stride=stride, **call.fields),
        grid=call.grid, in_specs=in_specs, out_specs=out_specs, out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in memory],
        compiler_params=call.order, name="attention",
    )(*call.operands, *(x[:, None] for x in bias), *mixing)  # fmt: skip
    return (out.reshape(query.shape), *(x.reshape(b, heads, keys) for x in sums))


def _backward(query, key, value, grad, *bias):
    call = _Call.of(query, key, value, bool(bias))
    b, _, heads, _ = query.shape
    keys, tiles, block = key.shape[1], call.grid[2], call.blocks.heads
    in_specs = [*call.specs, call.tile]
    out_specs = [call.tile, call.whole, call.whole]
    out_shape = [jax.ShapeDtypeStruct(_flat(x).shape, x.dtype) for x in (query, key, value)]
    if bias:
        in_specs.append(pl.BlockSpec((1, keys, 1), lambda i, h, t: (i, 0, 0)))
        out_specs.append(pl.BlockSpec((1, 1, keys, 1), lambda i, h, t: (i, h, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((b, heads // block, keys, 1), jnp.float32))
    width = block * query.shape[3]
    sums = [pltpu.VMEM((keys, width), jnp.float32)] * 2 if tiles > 1 else []
    *grads, = pl.pallas_call(
        functools.partial(backward_kernel, tiles=tiles, **call.fields),
        grid=call.grid, in_specs=in_specs, out_specs=out_specs, out_shape=out_shape,
        scratch_shapes=sums, compiler_params=call.order, name="attention_backward",
    )(*call.operands, _flat(grad), *(x[:, :, None] for x in bias))  # fmt: skip
    shaped = [x.reshape(y.shape) for x, y in zip(grads, (query, key, value), strict=False)]
    return (*shaped, *(x.sum(axis=(1, 3)) for x in grads[3:]))


# On arrays of all devices: examples and heads may be divided, tokens and channels not ---------------------------------


@functools.cache
def _divided(biased: bool, summed: bool = False, backward: bool = False) -> Callable:
    """The kernels without a selector."""
    bias = ", b k" if biased else ""
    if backward:
        rule = f"b q h c, b k h c, b k h c, b q h c{bias} -> b q h c, b k h c, b k h c{bias}"
        # The gradient of the bias is a sum over heads.
        return divide(_backward, rule, ("q", "h", "c", "k") if biased else ("q", "c", "k"))
    rule = f"b q h c, b k h c, b k h c{bias} -> b q h c{', b h k' if summed else ''}"
    return divide(functools.partial(_forward, summed=summed), rule, ("q", "c", "k"))


@functools.cache
def _selected_divided(stride: int) -> Callable:
    """The kernel with a selector, which mixes heads: they are not divided."""
    rule = "b q h c, b k h c, b k h c, e r, e s, u v -> b q h c, b h k"
    return divide(
        functools.partial(_selected, stride=stride),
        rule,
        ("q", "h", "c", "k", "e", "r", "s", "u", "v"),
    )


@jax.custom_vjp
def attention(query: Queries, key: Keys, value: Keys, *bias: Float[Array, "b k"]) -> Queries:
    """`ops.attention.attention` for shapes that `supports` names, in programs compiled for a TPU.

    `bias`, one array or none, is added to every logit of a key.
    """
    return _divided(bool(bias))(query, key, value, *bias)[0]


def _attention_forward(query, key, value, *bias):
    return attention(query, key, value, *bias), (query, key, value, bias)


def _attention_backward(arrays, grad):
    query, key, value, bias = arrays
    return _divided(bool(bias), backward=True)(query, key, value, grad, *bias)


attention.defvjp(_attention_forward, _attention_backward)


@jax.custom_vjp
def attention_and_column_sums(
    query: Queries, key: Keys, value: Keys
) -> tuple[Queries, Float[Array, "b h k"]]:
    """`ops.attention.attention_and_column_sums` for the same shapes. No gradient passes through the sums."""
    out, sums = _divided(False, summed=True)(query, key, value)
    return out, sums


def _sums_forward(query, key, value):
    return attention_and_column_sums(query, key, value), (query, key, value)


def _sums_backward(arrays, grads):
    return _divided(False, backward=True)(*arrays, grads[0])


attention_and_column_sums.defvjp(_sums_forward, _sums_backward)


def _for_groups(
    expand: Float[Array, "h f"],
    expand_bias: Float[Array, " f"],
    contract: Float[Array, "f h"],
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> tuple[jax.Array, ...]:
    """A selector's layers for `mixed_rows` rows of all heads at once: two matrices, between them a bias as a column.

    The second one is scaled for exponentials of base 2, which is what the chip has.
    """
    together = mixed_rows(len(expand))
    identity = jnp.eye(together, dtype=jnp.float32)
    column = jnp.repeat(expand_bias.astype(jnp.float32), together)[:, None]
    first, second = (
        jnp.kron(kernel.T.astype(jnp.float32), identity) for kernel in (expand, contract)
    )
    return first.astype(dtype), column, (second * math.log2(math.e)).astype(dtype)


def _selected(query, key, value, *layers, stride):
    """`attention_and_selector_sums` on the arrays of one device."""
    return _forward(query, key, value, summed=True, mixing=layers, stride=stride)


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

    For shapes that `supports_selector` names. The selector reads every stride-th row of the logits; its two layers mix
    heads in bfloat16 and add up in float32. No gradient passes through the sums.
    """
    layers = _for_groups(expand, expand_bias, contract)
    out, sums = _selected_divided(stride)(query, key, value, *layers)
    return out, sums


def _selected_forward(query, key, value, expand, expand_bias, contract, stride):
    layers = expand, expand_bias, contract
    found = attention_and_selector_sums(query, key, value, *layers, stride)
    return found, (query, key, value, layers)


def _selected_backward(stride, arrays, grads):
    *heads, layers = arrays
    of_heads = _divided(False, backward=True)(*heads, grads[0])
    return (*of_heads, *(jnp.zeros_like(x) for x in layers))


attention_and_selector_sums.defvjp(_selected_forward, _selected_backward)
