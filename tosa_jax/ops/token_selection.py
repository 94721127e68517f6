"""The idea in pure functions: select tokens by score, gather them, put them back.

All counts are Python ints, so that every shape is static under `jit`. Nothing here knows a model.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from tosa_jax.ops.array_types import PerExample, Scores, Tokens
from tosa_jax.ops.platforms import by_platform
from tosa_jax.ops.tpu_kernels import SUBLANES


class Selection(NamedTuple):
    """One chosen set of tokens an example, in the three forms that gather and scatter read.

    indices  int32 [b s], ascending, prefix tokens included.
    mask     bool  [b n], true for selected tokens.
    slot     int32 [b n], the place of a selected token among the selected ones; of a bypassed token, the place of
             the one that stands in for it, where representatives were looked for. In [0, s) everywhere.
    hot      [b s n], one where a token has a place: where it is there, gather and scatter are matrix products, which
             suits the matrix units of TPUs. They are asked for full precision: by default a TPU would round float32
             tokens to bfloat16.
    """

    indices: Int32[Array, "b s"]
    mask: Bool[Array, "b n"]
    slot: Int32[Array, "b n"]
    hot: Float[Array, "b s n"] | None = None


def with_one_hot(selection: Selection, dtype: jnp.dtype) -> Selection:
    """The selection with its one-hot matrix, in the dtype of the tokens."""
    hot = jax.nn.one_hot(selection.indices, selection.mask.shape[1], dtype=dtype)
    return selection._replace(hot=hot)


def num_selected(
    num_patches: int, num_prefix_tokens: int, keep_rate: float, multiple: int = 1
) -> int:
    """Static token count `prefix + ceil(keep_rate * patches)`; rounding first keeps .7 * 10 at 7.

    `keep_rate` in (0, 1]. The count is rounded up to a multiple, as far as there are tokens.
    """
    count = num_prefix_tokens + math.ceil(round(keep_rate * num_patches, 6))
    return min(math.ceil(count / multiple) * multiple, num_prefix_tokens + num_patches)


def selection_from_indices(indices: Int32[Array, "b s"], num_tokens: int) -> Selection:
    """A selection of given tokens: `indices` unique and ascending in each row, in [0, num_tokens)."""
    mask = (indices[:, :, None] == jnp.arange(num_tokens)[None, None]).any(axis=1)
    return Selection(indices, mask, _slots(mask))


def _slots(mask: Bool[Array, "b n"]) -> Int32[Array, "b n"]:
    """How many tokens before each one are in the mask; of a token that is not, the slot of the one before it."""
    slot = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    # XLA for GPUs would else count again for every channel of every token that is put in its place.
    return jax.lax.optimization_barrier(slot)


@jax.named_scope("selection")
def select_tokens(scores: Scores, count: int, num_prefix_tokens: int) -> Selection:
    """The prefix tokens and the `count - prefix` patches of highest score, in raster order.

    scores [b n], higher is better; ties go to the lower index. `count` in [prefix, n]. No gradient passes.
    """
    chosen = by_platform(
        jax.lax.stop_gradient(scores),
        tpu=functools.partial(_select_by_rank, count=count, num_prefix_tokens=num_prefix_tokens),
        default=functools.partial(
            _select_by_sorting, count=count, num_prefix_tokens=num_prefix_tokens
        ),
    )
    return Selection(*chosen)


def _select_by_sorting(scores: Scores, count: int, num_prefix_tokens: int) -> tuple[Array, ...]:
    # Not lax.top_k: on CPU and GPU its program first gathers the scores of all devices' examples.
    best = jnp.argsort(-scores[:, num_prefix_tokens:], axis=1)[:, : count - num_prefix_tokens]
    patches = jnp.sort(best, axis=1) + num_prefix_tokens
    prefix = jnp.broadcast_to(jnp.arange(num_prefix_tokens), (scores.shape[0], num_prefix_tokens))
    indices = jnp.concatenate([prefix, patches], axis=1).astype(jnp.int32)
    return selection_from_indices(indices, scores.shape[1])[:3]


def _select_by_rank(scores: Scores, count: int, num_prefix_tokens: int) -> tuple[Array, ...]:
    """The same without sorting, which takes a TPU longer than to compare every score with every other one."""
    count = min(count, scores.shape[1])  # as where sorted places are cut off
    place = jnp.arange(scores.shape[1], dtype=jnp.int32)
    first = place[:, None] < place[None, :]
    is_patch = place >= num_prefix_tokens
    mask = ~is_patch[None] | (ranks(scores, is_patch) < count - num_prefix_tokens)
    slot = jnp.einsum(
        "bm,mn->bn", mask.astype(jnp.bfloat16), first.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    ).astype(jnp.int32)  # fmt: skip
    # As from sorted indices: a bypassed token has the slot of the selected one before it.
    slot = jnp.maximum(jnp.where(mask, slot, slot - 1), 0)
    return indices_of(mask, slot, count), mask, slot


def ranks(scores: Scores, counted: Bool[Array, " n"]) -> Float[Array, "b n"]:
    """How many of the counted scores are higher than each one, or equal and before it: whole numbers, float32.

    A score that is no number is lower than all others. Counts are products with ones, which are exact: a TPU takes
    longer to add up what it compares.
    """
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    place = jnp.arange(scores.shape[1])
    other, own = scores[:, :, None], scores[:, None, :]
    first = place[:, None] < place[None, :]
    higher = ((other > own) | ((other == own) & first[None])) & counted[None, :, None]
    ones = jnp.ones((scores.shape[0], len(place)), jnp.bfloat16)
    return counts(ones, higher)


def indices_of(
    mask: Bool[Array, "b n"], slot: Int32[Array, "b n"], count: int
) -> Int32[Array, "b s"]:
    """`Selection.indices` of `count` selected tokens, from `Selection.mask` and `.slot`, without sorting."""
    here = mask[:, None] & (slot[:, None] == jnp.arange(count)[None, :, None])
    places = jnp.arange(mask.shape[1], dtype=jnp.int32)
    return jnp.where(here, places[None, None], 0).sum(axis=2, dtype=jnp.int32)


def counts(weights: Float[Array, "b m"], pairs: Bool[Array, "b m n"]) -> Float[Array, "b n"]:
    """The sum of weights [b m] over the true ones of each column of `pairs`, by a product, float32.

    Weights are 0 or 1. They stand in several rows, because XLA turns a product with one row into a sum again.
    """
    rows = jnp.broadcast_to(weights[:, None], (weights.shape[0], SUBLANES, weights.shape[1]))
    rows, pairs = rows.astype(jnp.bfloat16), pairs.astype(jnp.bfloat16)
    return jnp.einsum("bkm,bmn->bkn", rows, pairs, preferred_element_type=jnp.float32)[:, 0]


def take(values: Int32[Array, "b n"], places: Int32[Array, "b m"]) -> Int32[Array, "b m"]:
    """values [b n] at places [b m]."""

    def by_product(values, places):
        hot = jax.nn.one_hot(places, values.shape[1], dtype=jnp.float32)
        rows = jnp.broadcast_to(
            values[:, None].astype(jnp.float32), (values.shape[0], 8, values.shape[1])
        )
        return jnp.einsum("bkn,bmn->bkm", rows, hot, precision="highest")[:, 0].astype(values.dtype)

    def by_index(values, places):
        return jnp.take_along_axis(values, places, axis=1, mode="promise_in_bounds")

    return by_platform(values, places, tpu=by_product, default=by_index)


def complement(selection: Selection) -> Selection:
    """The tokens that are not selected, as a selection of their own."""
    n, s = selection.mask.shape[1], selection.indices.shape[1]
    mask = ~selection.mask
    indices = jnp.sort(jnp.where(mask, jnp.arange(n, dtype=jnp.int32)[None], n), axis=1)
    others = Selection(indices[:, : n - s], mask, _slots(mask))
    return others if selection.hot is None else with_one_hot(others, selection.hot.dtype)


# Gather and scatter are each other's transpose. Written with their own derivatives, each is a gather in both
# directions: the scatter-add that differentiating a gather would give is slow on GPUs and never compiled.


@jax.named_scope("selection")
def gather_tokens(tokens: Tokens, selection: Selection) -> Float[Array, "b s d"]:
    """tokens [b n d] -> the selected ones [b s d], in raster order."""
    if selection.hot is not None:
        return jnp.einsum("bsn,bnd->bsd", selection.hot, tokens, precision="highest")
    return _gather(tokens, selection)


@jax.named_scope("selection")
def scatter_tokens(
    base: Float[Array, "..."], selected: Float[Array, "b s d"], selection: Selection
) -> Tokens:
    """`base` [b n d] (or a scalar) with the selected rows replaced by `selected` [b s d].

    Rows that are not selected are bit-identical to those of `base`.
    """
    if selection.hot is not None:
        placed = jnp.einsum("bsn,bsd->bnd", selection.hot, selected, precision="highest")
        return jnp.where(selection.mask[:, :, None], placed, base)
    return _scatter(base, selected, selection)


def has_slot(selection: Selection) -> Bool[Array, "b s n"]:
    """Which slot each token has, selected or not."""
    slots = jnp.arange(selection.indices.shape[1], dtype=jnp.int32)
    return selection.slot[:, None] == slots[None, :, None]


@jax.custom_vjp
def _gather(tokens, selection):
    def by_product(tokens, selection):
        # Bypassed tokens get a slot that there is not: to leave them out of the matrix would take another walk over it.
        slot = jnp.where(selection.mask, selection.slot, selection.indices.shape[1])
        hot = has_slot(selection._replace(slot=slot)).astype(tokens.dtype)
        return jnp.einsum("bsn,bnd->bsd", hot, tokens, precision="highest")

    def by_index(tokens, selection):
        return jnp.take_along_axis(
            tokens, selection.indices[:, :, None], axis=1, mode="promise_in_bounds"
        )

    return by_platform(tokens, selection, tpu=by_product, default=by_index)


def _gather_forward(tokens, selection):
    return _gather(tokens, selection), selection


def _gather_backward(selection, grad):
    return _place(jnp.zeros((), grad.dtype), grad, selection), None


def _place(base, selected, selection):
    return jnp.where(selection.mask[:, :, None], take_slots(selected, selection), base)


def take_slots(values: Float[Array, "b s d"], selection: Selection) -> Tokens:
    """values [b s d] of the selected tokens -> [b n d]: each token's are those at its slot.

    On a TPU a product with a matrix of ones and zeros, which is exact and does not leave the matrix unit waiting for
    rows of memory. Has no derivative of its own: callers bring theirs.
    """

    def by_product(values, selection):
        hot = has_slot(selection).astype(values.dtype)
        return jnp.einsum("bsn,bsd->bnd", hot, values, precision="highest")

    def by_index(values, selection):
        return jnp.take_along_axis(
            values, selection.slot[:, :, None], axis=1, mode="promise_in_bounds"
        )

    return by_platform(values, selection, tpu=by_product, default=by_index)


@jax.custom_vjp
def _scatter(base, selected, selection):
    return _place(base, selected, selection)


def _scatter_forward(base, selected, selection):
    return _place(base, selected, selection), (selection, base.ndim)


def _scatter_backward(residuals, grad):
    selection, ndim = residuals
    bypassed = jnp.where(selection.mask[:, :, None], 0, grad)
    return bypassed if ndim else bypassed.sum(), _gather(grad, selection), None


_gather.defvjp(_gather_forward, _gather_backward)
_scatter.defvjp(_scatter_forward, _scatter_backward)


def overlap(found: Scores, truth: Scores, count: int, num_prefix_tokens: int) -> PerExample:
    """Share in [0, 1] of the patches that `truth` would select which `found` selects too."""
    if count == num_prefix_tokens:
        return jnp.ones(found.shape[0])
    chosen = select_tokens(found, count, num_prefix_tokens).mask
    wanted = select_tokens(truth, count, num_prefix_tokens).mask
    both = (chosen & wanted)[:, num_prefix_tokens:].sum(axis=1)
    return both / (count - num_prefix_tokens)
