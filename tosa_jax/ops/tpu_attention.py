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
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tosa_jax.ops.array_types import Keys, Queries

LANES, SUBLANES = 128, 8
"""Columns and rows of a vector register of a TPU: blocks of columns begin at multiples of the first."""

MIXED_ROWS = 16
"""Query rows that a selector works on at a time: those of all heads lie below one another, and a product mixes them."""

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


def selector_blocks(queries: int, keys: int, heads: int, head_dim: int) -> Blocks | None:
    """Blocks where a selector reads the logits: all heads, because it mixes them, and whole groups of rows."""
    width = _round_up(heads * head_dim, LANES)
    for tiles in range(1, 1 + math.ceil(queries / MIXED_ROWS)):
        rows = _round_up(math.ceil(queries / tiles), MIXED_ROWS)
        # Operands twice; logits, their rounded copy and weights; what a group of rows is mixed into.
        operands = 2 * 2 * width * 2 * (rows + keys)
        maps = _round_up(keys, LANES) * heads * (10 * rows + 12 * MIXED_ROWS)
        if operands + maps <= _VMEM:
            return Blocks(heads, rows)
    return None


def supports(query: Queries, key: Keys) -> bool:
    """Whether a kernel takes these arrays: bfloat16, at least 32 channels a head and 8 queries, blocks that fit."""
    heads, head_dim = query.shape[2:]
    fits = blocks(query.shape[1], key.shape[1], heads, head_dim)
    large = head_dim >= 32 and query.shape[1] >= SUBLANES
    return query.dtype == jnp.bfloat16 and large and fits is not None


def supports_selector(query: Queries, key: Keys) -> bool:
    """Whether a kernel takes these arrays and a selector of width 1."""
    return supports(query, key) and selector_blocks(*query.shape[1:2], *key.shape[1:]) is not None


# Inside a kernel ----------------------------------------------------------------------------------------------------


def _dot(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    """Matrix product of two matrices over the named axes, in float32."""
    dims = (((over_a,), (over_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


class _Group(NamedTuple):
    """Heads that share the lanes of a register, and where those lie in a block."""

    heads: tuple[int, ...]
    lanes: slice

    def only(self, x: jax.Array, place: int, head_dim: int) -> jax.Array:
        """`x` with the lanes of the group's other heads set to 0: a product over all lanes is then one head's."""
        return x if len(self.heads) == 1 else jnp.where(self._own(x, place, head_dim), x, 0)

    def join(self, parts: list[jax.Array], head_dim: int) -> jax.Array:
        """One array whose lanes come from the part of the head that they belong to."""
        out = parts[0]
        for place, part in enumerate(parts[1:], 1):
            out = jnp.where(self._own(part, place, head_dim), part, out)
        return out

    @staticmethod
    def _own(x: jax.Array, place: int, head_dim: int) -> jax.Array:
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return (lane >= place * head_dim) & (lane < (place + 1) * head_dim)


def _groups(heads: int, head_dim: int) -> list[_Group]:
    together = LANES // head_dim if LANES % head_dim == 0 else 1
    return [
        _Group(
            tuple(range(first, min(first + together, heads))),
            slice(first * head_dim, min(first + together, heads) * head_dim),
        )
        for first in range(0, heads, together)
    ]


def _rows_inside(x: jax.Array, tile: jax.Array, total: int) -> jax.Array:
    """A tile of rows with those beyond the array's end, which hold anything, set to 0."""
    if total % x.shape[0] == 0:
        return x
    row = tile * x.shape[0] + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < total, x, 0)


def _scaled(query: jax.Array, head_dim: int) -> jax.Array:
    return (query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype)


def _forward_kernel(
    *refs, head_dim: int, heads: int, queries: int, biased: bool, summed: bool, mixed: bool
):
    query_ref, key_ref, value_ref, *rest = refs
    bias_ref = rest.pop(0) if biased else None
    mixing = [rest.pop(0)[...] for _ in range(4 if mixed else 0)]
    out_ref, sums_ref = rest if summed else (rest[0], None)
    tile = pl.program_id(2)
    groups = _groups(heads, head_dim)

    # All logits first: the matrix unit works on the next heads while the vector unit is at the softmax of others.
    logits = []
    for group in groups:
        query = _scaled(_rows_inside(query_ref[0, :, group.lanes], tile, queries), head_dim)
        key = key_ref[0, :, group.lanes]
        logits += [_dot(group.only(query, i, head_dim), key, 1, 1) for i in range(len(group.heads))]
    if bias_ref is not None:
        logits = [x + bias_ref[0] for x in logits]
    weights = [jnp.exp(x - x.max(axis=1, keepdims=True)) for x in logits]
    scales = [1 / x.sum(axis=1, keepdims=True) for x in weights]
    for group in groups:
        value = value_ref[0, :, group.lanes]
        parts = [_dot(weights[h].astype(value.dtype), value, 1, 0) * scales[h] for h in group.heads]
        out_ref[0, :, group.lanes] = group.join(parts, head_dim).astype(out_ref.dtype)
    if sums_ref is None:
        return
    if mixed:
        sums = _sums_of_prediction(logits, mixing, tile, queries)
    else:
        sums = _join_rows(
            (x * _rows_inside(scale, tile, queries)).sum(axis=0, keepdims=True)
            for x, scale in zip(weights, scales, strict=True)
        )
    _accumulate(sums_ref, sums[None, None], tile)


def _join_rows(rows: Iterable[jax.Array]) -> jax.Array:
    return jnp.concatenate(list(rows), axis=0)


def _sums_of_prediction(logits: list[jax.Array], mixing, tile: jax.Array, queries: int):
    """Column sums [heads keys] of the map that a selector predicts from logits [rows keys], one array a head.

    mixing  the two layers of `_for_groups`, each with its bias.
    """
    expand, expand_bias, contract, contract_bias = mixing
    heads, rows = len(logits), logits[0].shape[0]
    rounded = [x.astype(expand.dtype) for x in logits]
    total = jnp.zeros((heads, logits[0].shape[1]), jnp.float32)
    for first in range(0, rows, MIXED_ROWS):
        group = _join_rows(x[first : first + MIXED_ROWS] for x in rounded)
        hidden = jax.nn.relu(_dot(expand, group, 1, 0) + expand_bias)
        found = _dot(contract, hidden.astype(contract.dtype), 1, 0) + contract_bias
        found = jnp.exp(found - found.max(axis=1, keepdims=True))
        scale = 1 / found.sum(axis=1, keepdims=True)
        if queries % rows:
            place = jax.lax.broadcasted_iota(jnp.int32, scale.shape, 0)
            row = tile * rows + first + jax.lax.rem(place, MIXED_ROWS)
            scale = jnp.where(row < queries, scale, 0)
        found = found * scale
        total += _join_rows(
            found[h * MIXED_ROWS : (h + 1) * MIXED_ROWS].sum(axis=0, keepdims=True)
            for h in range(heads)
        )
    return total


def _accumulate(ref, value: jax.Array, tile: jax.Array) -> None:
    """Adds `value` to what the tiles before this one left, which for the first one is nothing."""

    @pl.when(tile == 0)
    def _():
        ref[...] = value

    @pl.when(tile > 0)
    def _():
        ref[...] += value


def _backward_kernel(*refs, head_dim: int, heads: int, queries: int, tiles: int, biased: bool):
    query_ref, key_ref, value_ref, grad_ref, *rest = refs
    bias_ref = rest.pop(0) if biased else None
    query_out, key_out, value_out, *rest = rest
    bias_out = rest.pop(0) if biased else None
    key_sum, value_sum = rest if tiles > 1 else (None, None)
    tile = pl.program_id(2)
    bias_grads = []

    # The map is held transposed, [keys queries]: sums over keys are then sums of registers, and of the five products
    # only one needs a transposed operand.
    for group in _groups(heads, head_dim):
        query = _scaled(_rows_inside(query_ref[0, :, group.lanes], tile, queries), head_dim)
        grad = _rows_inside(grad_ref[0, :, group.lanes], tile, queries)
        key, value = key_ref[0, :, group.lanes], value_ref[0, :, group.lanes]
        parts = []
        for i in range(len(group.heads)):
            logits = _dot(group.only(key, i, head_dim), query, 1, 1)
            if bias_ref is not None:
                logits = logits + bias_ref[0]
            weights = jnp.exp(logits - logits.max(axis=0, keepdims=True))
            weights = weights * (1 / weights.sum(axis=0, keepdims=True))
            inner = weights * _dot(group.only(value, i, head_dim), grad, 1, 1)
            inner = inner - weights * inner.sum(axis=0, keepdims=True)
            if biased:
                bias_grads.append(inner.sum(axis=1, keepdims=True))
            weights, inner = weights.astype(query.dtype), inner.astype(query.dtype)
            parts.append(
                (_dot(inner, key, 0, 0), _dot(inner, query, 1, 0), _dot(weights, grad, 1, 0))
            )
        of_query, of_key, of_value = (
            group.join(list(part), head_dim) for part in zip(*parts, strict=True)
        )
        query_out[0, :, group.lanes] = (of_query * head_dim**-0.5).astype(query_out.dtype)
        if key_sum is None or value_sum is None:
            key_out[0, :, group.lanes] = of_key.astype(key_out.dtype)
            value_out[0, :, group.lanes] = of_value.astype(value_out.dtype)
        else:
            _accumulate(key_sum.at[:, group.lanes], of_key, tile)
            _accumulate(value_sum.at[:, group.lanes], of_value, tile)
    if bias_out is not None:
        total = sum(bias_grads[1:], start=bias_grads[0])
        _accumulate(bias_out, total[None, None], tile)
    if key_sum is not None and value_sum is not None:

        @pl.when(tile == tiles - 1)
        def _():
            key_out[0] = key_sum[...].astype(key_out.dtype)
            value_out[0] = value_sum[...].astype(value_out.dtype)


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
    def of(
        cls, query: Queries, key: Keys, value: Keys, biased: bool, mixed: bool = False
    ) -> "_Call":
        b, queries, heads, head_dim = query.shape
        choose = selector_blocks if mixed else blocks
        size = choose(queries, key.shape[1], heads, head_dim)
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


def _forward(query, key, value, *bias, summed: bool, mixing: tuple[jax.Array, ...] = ()):
    call = _Call.of(query, key, value, bool(bias), bool(mixing))
    b, queries, heads, _ = query.shape
    keys, block = key.shape[1], call.blocks.heads
    in_specs = list(call.specs)
    if bias:
        in_specs.append(pl.BlockSpec((1, 1, keys), lambda i, h, t: (i, 0, 0)))
    in_specs += [pl.BlockSpec(x.shape, lambda i, h, t: (0, 0)) for x in mixing]
    out_specs, out_shape = [call.tile], [jax.ShapeDtypeStruct(_flat(query).shape, query.dtype)]
    if summed:
        out_specs.append(pl.BlockSpec((1, 1, block, keys), lambda i, h, t: (i, h, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((b, heads // block, block, keys), jnp.float32))
    out, *sums = pl.pallas_call(
        functools.partial(_forward_kernel, summed=summed, mixed=bool(mixing), **call.fields),
        grid=call.grid, in_specs=in_specs, out_specs=out_specs, out_shape=out_shape,
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
        functools.partial(_backward_kernel, tiles=tiles, **call.fields),
        grid=call.grid, in_specs=in_specs, out_specs=out_specs, out_shape=out_shape,
        scratch_shapes=sums, compiler_params=call.order, name="attention_backward",
    )(*call.operands, _flat(grad), *(x[:, :, None] for x in bias))  # fmt: skip
    shaped = [x.reshape(y.shape) for x, y in zip(grads, (query, key, value), strict=False)]
    return (*shaped, *(x.sum(axis=(1, 3)) for x in grads[3:]))


# On arrays of all devices: examples and heads may be divided, tokens and channels not ---------------------------------


@functools.cache
def _divided(biased: bool, summed: bool = False, backward: bool = False):
    """The kernel's call for arrays that are divided over a mesh: each device works on what it has."""
    call = _backward if backward else functools.partial(_forward, summed=summed)
    bias = ", b k" if biased else ""
    if backward:
        rule = f"b q h c, b k h c, b k h c, b q h c{bias} -> b q h c, b k h c, b k h c{bias}"
    else:
        rule = f"b q h c, b k h c, b k h c{bias} -> b q h c{', b h k' if summed else ''}"
    # The gradient of the bias is a sum over heads. Letters are in the order of the rule.
    whole = ("q", *(["h"] if backward and biased else []), "c", "k")

    def partition(mesh, arguments, results):
        def shardings(tree):
            return jax.tree.map(lambda x: x.sharding, tree)

        return mesh, call, shardings(results), shardings(arguments)

    divided = custom_partitioning(lambda *arrays: call(*arrays))
    divided.def_partition(partition, sharding_rule=rule, need_replication_factors=whole)
    return divided


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
    kernel: Float[Array, "h f"],
    bias: Float[Array, " f"],
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> tuple[jax.Array, ...]:
    """A layer that mixes heads, as a matrix for `MIXED_ROWS` rows of all heads at once, and its bias as a column."""
    identity = jnp.eye(MIXED_ROWS, dtype=jnp.float32)
    matrix = jnp.kron(kernel.T.astype(jnp.float32), identity)
    column = jnp.repeat(bias.astype(jnp.float32), MIXED_ROWS)[:, None]
    return matrix.astype(dtype), column


def _selected(query, key, value, *layers):
    """`attention_and_selector_sums` on the arrays of one device."""
    return _forward(query, key, value, summed=True, mixing=layers)


@functools.cache
def _selected_divided():
    """The same on a mesh: examples may be divided; heads not, because the selector mixes them."""

    def partition(mesh, arguments, results):
        def shardings(tree):
            return jax.tree.map(lambda x: x.sharding, tree)

        return mesh, _selected, shardings(results), shardings(arguments)

    divided = custom_partitioning(lambda *arrays: _selected(*arrays))
    divided.def_partition(
        partition,
        sharding_rule="b q h c, b k h c, b k h c, e r, e s, u v, u w -> b q h c, b h k",
        need_replication_factors=("q", "h", "c", "k", "e", "r", "s", "u", "v", "w"),
    )
    return divided


@jax.custom_vjp
def attention_and_selector_sums(
    query: Queries,
    key: Keys,
    value: Keys,
    expand: Float[Array, "h f"],
    expand_bias: Float[Array, " f"],
    contract: Float[Array, "f h"],
    contract_bias: Float[Array, " h"],
) -> tuple[Queries, Float[Array, "b h k"]]:
    """Attention, and the column sums [b h k] of the map that a selector of width 1 predicts from its logits.

    For shapes that `supports` and `selector_blocks` name. The selector's two layers mix heads in bfloat16 and add up in
    float32; no gradient passes through the sums.
    """
    layers = (*_for_groups(expand, expand_bias), *_for_groups(contract, contract_bias))
    out, sums = _selected_divided()(query, key, value, *layers)
    return out, sums


def _selected_forward(query, key, value, *layers):
    return attention_and_selector_sums(query, key, value, *layers), (query, key, value, layers)


def _selected_backward(arrays, grads):
    *heads, layers = arrays
    of_heads = _divided(False, backward=True)(*heads, grads[0])
    return (*of_heads, *(jnp.zeros_like(x) for x in layers))


attention_and_selector_sums.defvjp(_selected_forward, _selected_backward)
