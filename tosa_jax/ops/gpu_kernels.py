"""The bodies of the kernels of `ops.gpu_attention`, written with Pallas for Triton.

A kernel computes with blocks whose sides are powers of two. They reach beyond the end of rows, keys and heads; every
read and write is masked there. The start of such a slice is an array, because Pallas refuses a constant one.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

UNIT = 16
"""The fewest rows, columns and terms of a product in a GPU's matrix unit."""

_LARGEST = 60_000.0
"""Half precision ends at 65,504: what is larger is cut off there."""

_LOG2_E = math.log2(math.e)
"""The chip's exponential is one of base 2: logits are scaled by this for it."""


class Heads(NamedTuple):
    """Where a kernel finds its heads: `queries` and `keys` of an example, `channels` a head."""

    queries: int
    keys: int
    channels: int

    @property
    def scale(self) -> float:
        """Of attention logits."""
        return self.channels**-0.5


def padded(count: int, least: int) -> int:
    """`count` rounded up to a power of two, at least `least`."""
    return max(least, pl.next_power_of_2(count))


def starts(widths: Sequence[int]) -> list[int]:
    """Where each of the pieces that follow each other begins."""
    return [sum(widths[:i]) for i in range(len(widths))]


def half(x: jax.Array) -> jax.Array:
    """x in half precision, cut off before it overflows."""
    return jnp.clip(x, -_LARGEST, _LARGEST).astype(jnp.float16)


def attention_kernel(
    query_ref: Any, key_ref: Any, value_ref: Any, out_ref: Any, *report_refs: Any,
    sizes: Heads, rows: int, widths: Sequence[int], firsts: Sequence[int], stride: int, report: str,
) -> None:  # fmt: skip
    """Attention of one head of an example, `rows` query rows at a time, all keys at once.

    query_ref, key_ref, value_ref   `[n, channels of all heads]`; those of queries, keys and values begin at `firsts`.
    widths                          of the pieces that the keys are read in.
    report                          "", "sums" (of the map over its rows) or "logits", into the one of `report_refs`,
                                    where a head has `stride` columns.
    """
    head = pl.program_id(1)
    query_first, key_first, value_first = (first + head * sizes.channels for first in firsts)
    pieces = list(zip(map(jnp.int32, starts(widths)), widths, strict=True))
    keys = [_rows(key_ref, *piece, sizes.keys, key_first, sizes.channels) for piece in pieces]
    values = [_rows(value_ref, *piece, sizes.keys, value_first, sizes.channels) for piece in pieces]
    is_key = [(start + jnp.arange(width) < sizes.keys)[None] for start, width in pieces]
    is_channel = (jnp.arange(values[0].shape[1]) < sizes.channels)[None]
    scale = sizes.scale * _LOG2_E

    def step(tile, sums):
        first = tile * rows
        is_row = (first + jnp.arange(rows) < sizes.queries)[:, None]
        query = _rows(query_ref, first, rows, sizes.queries, query_first, sizes.channels)
        maps = [plgpu.dot(query, key.T) for key in keys]
        if report == "logits":
            for (start, width), x in zip(pieces, maps, strict=True):
                at = pl.ds(first, rows), pl.ds(head * stride + start, width)
                _store(report_refs[0].at[at], half(x * sizes.scale), is_row)
        maps = [jnp.where(valid, x, -jnp.inf) for valid, x in zip(is_key, maps, strict=True)]
        largest = functools.reduce(jnp.maximum, (x.max(axis=1) for x in maps)) * scale
        maps = [jnp.exp2(x * scale - largest[:, None]) for x in maps]
        share = 1 / _total(x.sum(axis=1) for x in maps)
        out = _total(plgpu.dot(x.astype(v.dtype), v) for x, v in zip(maps, values, strict=True))
        at = pl.ds(first, rows), pl.ds(head * sizes.channels, out.shape[1])
        _store(out_ref.at[at], (out * share[:, None]).astype(out_ref.dtype), is_row & is_channel)
        if report == "sums":
            share = jnp.where(is_row, share[:, None], 0)
            sums = [total + (x * share).sum(axis=0) for total, x in zip(sums, maps, strict=True)]
        return sums

    sums = [jnp.zeros(width) for width in widths] if report == "sums" else []
    sums = jax.lax.fori_loop(0, pl.cdiv(sizes.queries, rows), step, sums)
    for start, width, total in zip(starts(widths), widths, sums, strict=False):
        report_refs[0][pl.ds(head * stride + start, width)] = total


def logits_kernel(
    query_ref: Any, key_ref: Any, out_ref: Any, *, sizes: Heads, rows: int, width: int, stride: int
) -> None:
    """Scaled logits of a tile of `rows` by `width` of one head, into `out_ref`, where a head has `stride` columns."""
    head, tile = pl.program_id(1), pl.program_id(2)
    pieces = stride // width
    first, start = tile // pieces * rows, tile % pieces * width
    channel = head * sizes.channels
    query = _rows(query_ref, first, rows, sizes.queries, channel, sizes.channels)
    key = _rows(key_ref, start, width, sizes.keys, channel, sizes.channels)
    logits = plgpu.dot(query, key.T) * sizes.scale
    at = pl.ds(first, rows), pl.ds(head * stride + start, width)
    _store(out_ref.at[at], half(logits), (first + jnp.arange(rows) < sizes.queries)[:, None])


def for_steps(
    expand: jax.Array, bias: jax.Array, contract: jax.Array, heads: int, slots: int
) -> tuple[jax.Array, ...]:
    """A selector's layers [h f], [f] and [f h] for `selector_kernel`.

    They are matrices for the query rows of a step at once, `slots // heads` of them: one block a row, zero elsewhere.
    """
    rows, (count, hidden) = slots // heads, expand.shape
    more = padded(rows * hidden, UNIT) - rows * hidden
    identity, missing = jnp.eye(rows), heads - count
    spread = jnp.kron(identity, jnp.pad(expand, ((0, missing), (0, 0))))
    gather = jnp.kron(identity, jnp.pad(contract, ((0, 0), (0, missing)))) * _LOG2_E
    layers = (
        jnp.pad(spread, ((0, 0), (0, more))),
        jnp.pad(jnp.tile(bias, rows), (0, more)),
        jnp.pad(gather, ((0, more), (0, 0))),
    )
    return tuple(map(half, layers))


def selector_kernel(
    logits_ref: Any, spread_ref: Any, bias_ref: Any, gather_ref: Any, out_ref: Any,
    *, queries: int, keys: int, heads: int, block: int, slots: int, steps: int, widths: Sequence[int],
) -> None:  # fmt: skip
    """The sums over `steps` steps of the softmax of mixed logits, for each of the `slots` rows of a step.

    logits_ref  `[queries * block, keys]`: a query row has `block` rows, of which the first `heads` hold something.
    """
    spread, bias, gather = spread_ref[...], bias_ref[...], gather_ref[...]
    slot = jnp.arange(slots)
    pieces = list(zip(starts(widths), widths, strict=True))
    first = pl.program_id(1) * steps * slots

    def step(i, sums):
        at = first + i * slots
        valid = (at + slot < queries * block) & (slot % block < heads)
        maps = []
        for start, width in pieces:
            is_key = start + jnp.arange(width) < keys
            at_keys = pl.ds(at, slots), pl.ds(start, width)
            inside = valid[:, None] & is_key[None]
            logits = plgpu.load(logits_ref.at[at_keys], mask=inside, other=0)
            # Keys are rows from here on: a product's result is the next one's left side as it lies in registers.
            channels = plgpu.dot(logits.T, spread).astype(jnp.float16) + bias[None]
            x = plgpu.dot(jnp.clip(channels, 0, _LARGEST), gather)
            within = start + width <= keys
            maps.append(x if within else jnp.where(is_key[:, None], x, -jnp.inf))
        largest = functools.reduce(jnp.maximum, (x.max(axis=0) for x in maps))
        maps = [jnp.exp2(x - largest[None]) for x in maps]
        share = jnp.where(valid, 1 / _total(x.sum(axis=0) for x in maps), 0)
        return [total + x * share[None] for total, x in zip(sums, maps, strict=True)]

    sums = [jnp.zeros((width, slots)) for width in widths]
    sums = jax.lax.fori_loop(0, steps, step, sums)
    for (start, width), total in zip(pieces, sums, strict=True):
        out_ref[:, pl.ds(start, width)] = total.T


def _rows(ref, start, size, count, first_channel, channels):
    """`size` rows of a head from `start` on, zero beyond the `count` rows that there are."""
    channel = jnp.arange(padded(channels, UNIT))
    inside = (start + jnp.arange(size) < count)[:, None] & (channel < channels)[None]
    at = pl.ds(start, size), pl.ds(first_channel, len(channel))
    return plgpu.load(ref.at[at], mask=inside, other=0)


def _store(ref, x, inside):
    plgpu.store(ref, x, mask=jnp.broadcast_to(inside, x.shape))


def _total(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)
