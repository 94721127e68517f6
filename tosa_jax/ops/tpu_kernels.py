"""The bodies of the attention kernels of `ops.tpu_attention`.

One call is a TPU's work on one example, some heads and a tile of query rows. The arrays lie in its fast memory, in
registers of 8 rows and 128 columns (lanes); a reference is read and written by indexing it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES, SUBLANES = 128, 8
"""Columns and rows of a vector register of a TPU: blocks of columns begin at multiples of the first."""


def mixed_rows(heads: int) -> int:
    """Query rows that a selector works on at a time: those of all heads lie one below another; a product mixes them.

    As many as fill the 128 rows of the matrix unit; of whole registers, 8 to 32.
    """
    return max(rows for rows in (8, 16, 32) if rows == 8 or rows * heads <= LANES)


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


def forward_kernel(
    *refs, head_dim: int, heads: int, queries: int, biased: bool, summed: bool, stride: int
):
    """Attention of a tile of queries, and column sums of its map or of the map that a selector predicts.

    refs     query [1 rows w], key and value [1 k w], then the bias [1 1 k] if `biased` and the selector's layers if
             there is a `stride`; then the results: output [1 rows w] and, if `summed`, sums [1 1 heads k], added up
             over tiles; then, for strides above 1, `stride_memory`.
    queries  rows of the whole array; what a last tile holds beyond them counts for nothing.
    stride   the selector reads every stride-th row, from the first one on; 0: there is no selector.
    """
    query_ref, key_ref, value_ref, *rest = refs
    bias_ref = rest.pop(0) if biased else None
    mixing = [rest.pop(0)[...] for _ in range(3 if stride else 0)]
    memory_ref = rest.pop() if stride > 1 else None
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
    if stride:
        read = logits if memory_ref is None else _every_row(logits, stride, memory_ref)
        rows = logits[0].shape[0]
        left = jnp.minimum(rows, queries - tile * rows) if queries % rows else rows
        sums = _sums_of_prediction(read, mixing, pl.cdiv(left, stride))
    else:
        sums = _join_rows(
            (x * _rows_inside(scale, tile, queries)).sum(axis=0, keepdims=True)
            for x, scale in zip(weights, scales, strict=True)
        )
    _accumulate(sums_ref, sums[None, None], tile)


def _join_rows(rows: Iterable[jax.Array]) -> jax.Array:
    return jnp.concatenate(list(rows), axis=0)


def stride_memory(heads: int, rows: int, keys: int, stride: int) -> tuple[int, ...]:
    """The shape of the float32 memory that rows of logits are read from a stride apart, whole groups of them."""
    span = mixed_rows(heads) * stride
    return heads, -(-keys // LANES), -(-rows // span) * span, LANES


def _every_row(logits: list[jax.Array], stride: int, memory_ref) -> list[jax.Array]:
    """Every stride-th row of each head's logits, and 0 beyond the last one up to a whole group of rows.

    A TPU reads rows that are apart from memory alone, and only where a row is one register wide.
    """
    rows, keys = logits[0].shape
    heads, blocks, room, _ = memory_ref.shape
    if room > rows:
        memory_ref[:, :, rows:] = jnp.zeros((heads, blocks, room - rows, LANES), jnp.float32)
    for head, x in enumerate(logits):
        for block in range(blocks):
            part = x[:, block * LANES : (block + 1) * LANES]
            memory_ref[head, block, :rows, : part.shape[1]] = part
    read = memory_ref[:, :, pl.ds(0, room // stride, stride), :]
    return [jnp.concatenate(list(x), axis=1)[:, :keys] for x in read]


def _sums_of_prediction(logits: list[jax.Array], mixing, count: int | jax.Array) -> jax.Array:
    """Column sums [heads keys] of the map that a selector predicts from logits [rows keys], one array a head.

    mixing  the layers of `for_groups`.
    count   rows that count; those after them hold anything that is finite.
    """
    expand, expand_bias, contract = mixing
    heads, rows = len(logits), logits[0].shape[0]
    together = mixed_rows(heads)
    rounded = [x.astype(expand.dtype) for x in logits]
    total = jnp.zeros((heads, logits[0].shape[1]), jnp.float32)
    for first in range(0, rows, together):
        group = _join_rows(x[first : first + together] for x in rounded)
        hidden = jax.nn.relu(_dot(expand, group, 1, 0) + expand_bias)
        found = _dot(contract, hidden.astype(contract.dtype), 1, 0)
        found = jnp.exp2(found - found.max(axis=1, keepdims=True))
        scale = 1 / found.sum(axis=1, keepdims=True)
        if not isinstance(count, int) or first + together > count:
            place = jax.lax.broadcasted_iota(jnp.int32, scale.shape, 0)
            scale = jnp.where(first + jax.lax.rem(place, together) < count, scale, 0)
        found = found * scale
        total += _join_rows(
            found[h * together : (h + 1) * together].sum(axis=0, keepdims=True)
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


def backward_kernel(*refs, head_dim: int, heads: int, queries: int, tiles: int, biased: bool):
    """Gradients of `forward_kernel`'s output; the map is computed again.

    refs  query [1 rows w], key and value [1 k w], the output's gradient [1 rows w], then the bias [1 k 1] if `biased`;
          then the gradients of all of these but the output, and with several `tiles` two float32 arrays [k w]
          that add up those of key and value.
    """
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
        # Products of the group's heads stand together: the vector unit works on one head during those of another.
        places = range(len(group.heads))
        logits = [_dot(group.only(key, i, head_dim), query, 1, 1) for i in places]
        inner = [_dot(group.only(value, i, head_dim), grad, 1, 1) for i in places]
        if bias_ref is not None:
            logits = [x + bias_ref[0] for x in logits]
        weights = [jnp.exp(x - x.max(axis=0, keepdims=True)) for x in logits]
        weights = [x * (1 / x.sum(axis=0, keepdims=True)) for x in weights]
        inner = [w * x for w, x in zip(weights, inner, strict=True)]
        inner = [x - w * x.sum(axis=0, keepdims=True) for w, x in zip(weights, inner, strict=True)]
        if biased:
            bias_grads += [x.sum(axis=1, keepdims=True) for x in inner]
        parts = []
        for w, x in zip(weights, inner, strict=True):
            w, x = w.astype(query.dtype), x.astype(query.dtype)
            parts.append((_dot(w, grad, 1, 0), _dot(x, query, 1, 0), _dot(x, key, 0, 0)))
        of_value, of_key, of_query = (
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
