"""The idea in pure functions: score tokens, select them, gather them, put them back, walk an attention map.

All counts are Python ints, so that every shape is static under `jit`. Nothing here knows a model.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PyTree

from tosa_jax.array_types import AttnLogits, AttnMap, Heads, PerExample, Scores, Tokens


class Selection(NamedTuple):
    """One chosen set of tokens an example, in the three forms that gather and scatter read.

    indices  int32 [b s], ascending, prefix tokens included.
    mask     bool  [b n], true for selected tokens.
    slot     int32 [b n], the place of a selected token among the selected ones; in [0, s) everywhere.
    """

    indices: Int32[Array, "b s"]
    mask: Bool[Array, "b n"]
    slot: Int32[Array, "b n"]


def num_selected(num_patches: int, num_prefix_tokens: int, keep_rate: float) -> int:
    """Static token count `prefix + ceil(keep_rate * patches)`; rounding first keeps .7 * 10 at 7."""
    return num_prefix_tokens + math.ceil(round(keep_rate * num_patches, 6))


def selection_from_indices(indices: Int32[Array, "b s"], num_tokens: int) -> Selection:
    """A selection of given tokens: `indices` unique and ascending in each row, in [0, num_tokens)."""
    mask = (indices[:, :, None] == jnp.arange(num_tokens)[None, None]).any(axis=1)
    slot = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    return Selection(indices, mask, slot)


def select_tokens(scores: Scores, count: int, num_prefix_tokens: int) -> Selection:
    """The prefix tokens and the `count - prefix` patches of highest score, in raster order.

    scores [b n], higher is better; ties go to the lower index. No gradient passes.
    """
    patch_scores = jax.lax.stop_gradient(scores)[:, num_prefix_tokens:]
    # Not lax.top_k: on CPU and GPU its program first gathers the scores of all devices' examples.
    best = jnp.argsort(-patch_scores, axis=1)[:, : count - num_prefix_tokens]
    patches = jnp.sort(best, axis=1) + num_prefix_tokens
    prefix = jnp.broadcast_to(jnp.arange(num_prefix_tokens), (len(scores), num_prefix_tokens))
    indices = jnp.concatenate([prefix, patches], axis=1).astype(jnp.int32)
    return selection_from_indices(indices, scores.shape[1])


# Gather and scatter are each other's transpose. Written with their own derivatives, each is a gather in both
# directions: the scatter-add that differentiating a gather would give is slow on GPUs and never compiled.


@jax.custom_vjp
def gather_tokens(tokens: Tokens, selection: Selection) -> Float[Array, "b s d"]:
    """tokens [b n d] -> the selected ones [b s d], in raster order."""
    return jnp.take_along_axis(
        tokens, selection.indices[:, :, None], axis=1, mode="promise_in_bounds"
    )


def _gather_forward(tokens, selection):
    return gather_tokens(tokens, selection), selection


def _gather_backward(selection, grad):
    return scatter_tokens(jnp.zeros((), grad.dtype), grad, selection), None


def _place(base, selected, selection):
    placed = jnp.take_along_axis(
        selected, selection.slot[:, :, None], axis=1, mode="promise_in_bounds"
    )
    return jnp.where(selection.mask[:, :, None], placed, base)


@jax.custom_vjp
def scatter_tokens(
    base: Float[Array, "..."], selected: Float[Array, "b s d"], selection: Selection
) -> Tokens:
    """`base` [b n d] (or a scalar) with the selected rows replaced by `selected` [b s d].

    Rows that are not selected are bit-identical to those of `base`.
    """
    return _place(base, selected, selection)


def _scatter_forward(base, selected, selection):
    return _place(base, selected, selection), (selection, base.ndim)


def _scatter_backward(residuals, grad):
    selection, ndim = residuals
    bypassed = jnp.where(selection.mask[:, :, None], 0, grad)
    return bypassed if ndim else bypassed.sum(), gather_tokens(grad, selection), None


gather_tokens.defvjp(_gather_forward, _gather_backward)
scatter_tokens.defvjp(_scatter_forward, _scatter_backward)


def pool_heads(values: Float[Array, "b h n"], how: str) -> Scores:
    """One value a token from one a head; `how` is "mean" or "max"."""
    return {"mean": jnp.mean, "max": jnp.max}[how](values, axis=1)


def column_sums(attn_map: AttnMap) -> Float[Array, "b h k"]:
    """How much attention each token is paid by these query rows."""
    return attn_map.sum(axis=2)


def overlap(found: Scores, truth: Scores, count: int, num_prefix_tokens: int) -> PerExample:
    """Share in [0, 1] of the patches that `truth` would select which `found` selects too."""
    if count == num_prefix_tokens:
        return jnp.ones(len(found))
    chosen = select_tokens(found, count, num_prefix_tokens).mask
    wanted = select_tokens(truth, count, num_prefix_tokens).mask
    both = (chosen & wanted)[:, num_prefix_tokens:].sum(axis=1)
    return both / (count - num_prefix_tokens)


def attention(query: Heads, key: Heads, value: Heads) -> Heads:
    """Softmax attention whose map nobody reads; logits and softmax in float32."""
    return jax.nn.dot_product_attention(query, key, value)


def attention_logits(query: Float[Array, "b q h dh"], key: Float[Array, "b k h dh"]) -> AttnLogits:
    """Scaled attention logits `q k^T / sqrt(dh)` in float32."""
    scale = query.shape[-1] ** -0.5
    return jnp.einsum("bqhc,bkhc->bhqk", query * scale, key, preferred_element_type=jnp.float32)


def walk_map(
    query: Heads,
    key: Heads,
    value: Heads,
    summarise: Callable[[AttnLogits, AttnMap, Any], PyTree],
    *,
    rows: PyTree = None,
    chunk: int | None = None,
) -> tuple[Heads, PyTree]:
    """Exact attention, and a sum over its map, without the map ever leaving this function.

    The walk goes over query rows in chunks. `summarise(logits, attn_map, rows)` sees the float32 logits and map
    `[b h q k]` of a chunk with the same rows of `rows` (a tree of `[b n ...]`), and returns a tree of arrays
    that are added up over the chunks. Memory is `h * chunk * n` an example, also backward, where each chunk
    is computed again; `chunk=None` takes all rows at once and recomputes nothing.
    """

    def step(query_rows, other_rows):
        logits = attention_logits(query_rows, key)
        attn_map = jax.nn.softmax(logits, axis=-1)
        out = jnp.einsum("bhqk,bkhc->bqhc", attn_map.astype(value.dtype), value)
        return out, summarise(logits, attn_map, other_rows)

    num_rows = query.shape[1]
    if chunk is None or chunk >= num_rows:
        return step(query, rows)

    step = jax.checkpoint(step)
    full = num_rows // chunk * chunk

    def split(x):
        chunks = x[:, :full].reshape(len(x), full // chunk, chunk, *x.shape[2:])
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
    out = jnp.moveaxis(out, 0, 1).reshape(len(query), full, *query.shape[2:])
    if full < num_rows:
        tail, part = step(*jax.tree.map(lambda x: x[:, full:], (query, rows)))
        out = jnp.concatenate([out, tail], axis=1)
        total = jax.tree.map(jnp.add, total, part)
    return out, total
