"""Token matching: each bypassed token gets a representative, the selected token that is most like it.

A selected token and the bypassed tokens that it represents are a group. Similarity is the cosine of features. No
gradient passes through a choice.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from tosa_jax.ops.array_types import Heads, Present, Scores, Tokens
from tosa_jax.ops.platforms import by_platform
from tosa_jax.ops.token_selection import (
    Selection,
    complement,
    counts,
    gather_tokens,
    has_slot,
    indices_of,
    ranks,
    select_tokens,
    take,
    take_slots,
)
from tosa_jax.ops.tpu_kernels import SUBLANES

SIZE_POWER = 0.3
"""How much sizes count in `merging_costs`. It was chosen on photographs that no result of this project is scored on."""

# Summing over groups and spreading to groups are transposes of each other. Each is the other's derivative, so that no
# scatter-add of floats is compiled.


@jax.custom_vjp
@jax.named_scope("selection")
def sum_groups(values: Tokens, selection: Selection) -> Float[Array, "b s d"]:
    """values [b n d] -> the sum over each group [b s d]."""

    def in_one_product(values, selection):
        width = values.shape[2]
        if width == 1:  # XLA would turn a product with one column into a sum
            values = jnp.broadcast_to(values, (*values.shape[:2], SUBLANES))
        hot = has_slot(selection).astype(values.dtype)
        sums = jnp.einsum("bsn,bnd->bsd", hot, values, precision="highest")
        return sums[:, :, :width]

    def apart(values, selection):
        sums = gather_tokens(values, selection)
        others = complement(selection)
        if not others.indices.shape[1]:
            return sums
        places = jnp.take_along_axis(selection.slot, others.indices, axis=1)
        hot = jax.nn.one_hot(places, sums.shape[1], dtype=values.dtype)
        moved = gather_tokens(values, others)
        return sums + jnp.einsum("bms,bmd->bsd", hot, moved, precision="highest")

    return by_platform(values, selection, tpu=in_one_product, default=apart)


@jax.custom_vjp
@jax.named_scope("selection")
def spread_groups(values: Float[Array, "b s d"], selection: Selection) -> Tokens:
    """values [b s d] -> [b n d]: each token gets the value of its group."""
    return take_slots(values, selection)


def _sum_forward(values, selection):
    return sum_groups(values, selection), selection


def _spread_forward(values, selection):
    return spread_groups(values, selection), selection


sum_groups.defvjp(_sum_forward, lambda selection, grad: (spread_groups(grad, selection), None))
spread_groups.defvjp(_spread_forward, lambda selection, grad: (sum_groups(grad, selection), None))


@jax.named_scope("selection")
def mean_of_heads(keys: Heads) -> Float[Array, "b n dh"]:
    """What is compared: keys [b n h dh] as their mean over heads. No gradient passes."""

    def by_product(keys):
        # On a TPU heads lie side by side in the same registers: to add them is work for the matrix unit.
        b, n, heads, dim = keys.shape
        mean = jnp.tile(jnp.eye(dim, dtype=keys.dtype), (heads, 1)) / heads
        return jnp.einsum("bnd,dc->bnc", keys.reshape(b, n, -1), mean, precision="highest")

    keys = jax.lax.stop_gradient(keys)
    return by_platform(keys, tpu=by_product, default=lambda keys: keys.mean(axis=2))


def cosines(a: Float[Array, "b n f"], b: Float[Array, "b m f"]) -> Float[Array, "b n m"]:
    """Cosine similarity of each row of `a` with each row of `b`, in float32. No gradient passes."""

    def unit(x):
        x = jax.lax.stop_gradient(x).astype(jnp.float32)
        return x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + 1e-12)

    return jnp.einsum("bnf,bmf->bnm", unit(a), unit(b))


@jax.named_scope("selection")
def with_representatives(
    features: Float[Array, "b n f"], selection: Selection, num_prefix_tokens: int
) -> Selection:
    """The same selection; each bypassed token now has a representative, the selected patch that is most like it."""

    def among_others(features, selection):
        others = complement(selection)
        similarity = cosines(gather_tokens(features, others), gather_tokens(features, selection))
        nearest = _argmax_patch(similarity, num_prefix_tokens)
        return jnp.take_along_axis(nearest, others.slot, axis=1)

    def among_all(features, selection):
        """The same with a place for the selected ones too: a TPU has no rows to collect then."""
        similarity = cosines(features, gather_tokens(features, selection))
        return _argmax_patch(similarity, num_prefix_tokens)

    slot = by_platform(
        jax.lax.stop_gradient(features), selection, tpu=among_all, default=among_others
    )
    return selection._replace(slot=jnp.where(selection.mask, selection.slot, slot))


def merging_costs(
    a: Float[Array, "b n f"],
    b: Float[Array, "b m f"],
    sizes_a: Float[Array, "b n"],
    sizes_b: Float[Array, "b m"],
) -> Float[Array, "b n m"]:
    """What it costs to merge each row of `a` with each row of `b`, float32 in [0, inf). No gradient passes.

    It is the squared distance times a power of x y / (x + y), where x and y are their sizes: how many patches each one
    stands for. With power 1 it is the criterion of Ward (1963, "Hierarchical grouping to optimize an objective
    function"), and with power 0 sizes do not count.
    """
    a, b, sizes_a, sizes_b = map(jax.lax.stop_gradient, (a, b, sizes_a, sizes_b))
    # Exact products: what is subtracted is about as large.
    products = jnp.einsum(
        "bnf,bmf->bnm", a, b, precision="highest", preferred_element_type=jnp.float32
    )
    of_a, of_b = (jnp.square(x.astype(jnp.float32)).sum(axis=2) for x in (a, b))
    distance = jnp.maximum(of_a[:, :, None] + of_b[:, None] - 2 * products, 0)
    x, y = (x.astype(jnp.float32) for x in (sizes_a[:, :, None], sizes_b[:, None]))
    return distance * (x * y / jnp.maximum(x + y, 1e-12)) ** SIZE_POWER


def candidates(
    num_tokens: int, num_prefix_tokens: int, first: int = 0, rows: int = 0
) -> np.ndarray:
    """Booleans [n]: the tokens that `bipartite_matching` may bypass, every second patch from number `first` on.

    rows  of the grid. If given, they are the fields of one colour of a chessboard, so that all four neighbours of a
          patch are of the other colour. Where some patches have left, it is taken that each row lost as many. With
          fewer than two patches a row it is every second one again.
    """
    patch = np.arange(num_tokens) - num_prefix_tokens
    number = max(num_tokens - num_prefix_tokens, 1)
    row = patch * rows // number if number >= 2 * rows else 0
    return (patch >= first) & ((patch - first + row) % 2 == 0)


@jax.named_scope("selection")
def with_nearest(
    features: Float[Array, "b n f"], selection: Selection, num_prefix_tokens: int
) -> tuple[Selection, Scores]:
    """What `with_representatives` gives, and the cosine [b n] of each token to the selected patch most like it."""
    similarity = cosines(features, gather_tokens(jax.lax.stop_gradient(features), selection))
    nearest = _argmax_patch(similarity, num_prefix_tokens)
    slot = jnp.where(selection.mask, selection.slot, nearest)
    return selection._replace(slot=slot), similarity[:, :, num_prefix_tokens:].max(axis=2)


@jax.named_scope("selection")
def two_way_matching(
    similarity: Float[Array, "b e o"], leaving: tuple[int, int], num_prefix_tokens: int
) -> Selection:
    """Bypasses tokens at even places, then at odd ones, that are most like one on the other side that stays.

    similarity  of each token at an even place to each one at an odd place.
    leaving     how many of the even ones leave, and how many of the odd ones after that.

    What represents an even token may itself leave: then both have the same representative (MCTF, Lee et al. 2024).
    """
    evens, odds = similarity.shape[1:]
    n = evens + odds
    even, odd = np.arange(0, n, 2), np.arange(1, n, 2)
    prefix = (even < num_prefix_tokens)[:, None] | (odd < num_prefix_tokens)[None]
    similarity = jnp.where(prefix[None], -jnp.inf, jax.lax.stop_gradient(similarity))

    def leave(likeness, number):
        """The tokens that stay, [b e], and the most similar one on the other side."""
        stays = select_tokens(-likeness.max(axis=2), likeness.shape[1] - number, 0).mask
        return stays, likeness.argmax(axis=2)

    even_stays, to_odd = leave(similarity, leaving[0])
    among = jnp.where(even_stays[:, :, None], similarity, -jnp.inf).transpose(0, 2, 1)
    odd_stays, to_even = leave(among, leaving[1])
    sorted_places = np.argsort(np.concatenate([even, odd]))

    def together(of_even, of_odd):
        return jnp.concatenate([of_even, of_odd], axis=1)[:, sorted_places]

    own = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (similarity.shape[0], n))
    stays = together(even_stays, odd_stays)
    owner = jnp.where(stays, own, together(jnp.asarray(odd)[to_odd], jnp.asarray(even)[to_even]))
    owner = owner.astype(jnp.int32)
    selection = select_tokens(stays.astype(jnp.float32), n - sum(leaving), 0)
    return selection._replace(slot=take(selection.slot, take(owner, owner)))


@jax.named_scope("selection")
def bipartite_matching(
    features: Float[Array, "b n f"],
    count: int,
    num_prefix_tokens: int,
    first: int = 0,
    present: Present | None = None,
    rows: int = 0,
    sizes: Float[Array, "b n"] | None = None,
) -> tuple[Selection, Scores]:
    """Selects `count` tokens and bypasses the `n - count` patches that are most like their representative.

    The `candidates` may be bypassed, by `first` and `rows` (0 or 1; of the grid); their representatives are among the
    other patches. This is the bipartite matching of ToMe (Bolya et al. 2023, "Token Merging: Your ViT But Faster").
    `count` is at least `least_after_matching(n, num_prefix_tokens, first, rows)`.

    present  [b n], false for padding, which is bypassed before all other patches and represents none of them. None:
             there is none.
    sizes    [b n], how many patches each token stands for. If given, those are alike that cost little to merge
             (`merging_costs`): their likeness is 1 / (1 + cost). None: likeness is the cosine.

    Returns the selection, and scores [b n]: 1 - likeness to the representative, in [0, 2], for patches that may be
    bypassed, -1 for padding among them, and 3 for all other tokens.
    """
    n = features.shape[1]
    may_leave = candidates(n, num_prefix_tokens, first, rows)
    fields = {"count": count, "num_prefix_tokens": num_prefix_tokens, "leave": may_leave}
    by_product = functools.partial(_match_by_product, **fields)
    by_index = functools.partial(_match_by_index, **fields)
    chosen, scores = by_platform(features, present, sizes, tpu=by_product, default=by_index)
    return Selection(*chosen), scores


def _match_by_index(features, present, sizes, *, count, num_prefix_tokens, leave):
    places = np.arange(features.shape[1])
    number = np.where(leave, leave.cumsum() - 1, 0)  # among those that may leave
    stay = places[~leave]
    if sizes is None:
        similarity = cosines(features[:, leave], features[:, ~leave])
    else:
        costs = merging_costs(
            features[:, leave], features[:, ~leave], sizes[:, leave], sizes[:, ~leave]
        )
        similarity = 1 / (1 + costs)
    if present is not None:
        similarity = jnp.where(present[:, stay][:, None], similarity, -2.0)
    likeness = similarity[:, :, num_prefix_tokens:].max(axis=-1)
    scores = jnp.where(leave[None], 1 - likeness[:, number], 3.0)
    if present is not None:
        scores = jnp.where(leave[None] & ~present, -1.0, scores)
    selection = select_tokens(scores, count, num_prefix_tokens)
    nearest = jnp.asarray(stay)[_argmax_patch(similarity, num_prefix_tokens)]
    owner = jnp.where(selection.mask, places[None], nearest[:, number])
    return (selection.indices, selection.mask, take(selection.slot, owner)), scores


def _match_by_product(features, present, sizes, *, count, num_prefix_tokens, leave):
    """The same without rows that are collected one by one, which a TPU is slow at.

    What is collected comes by products with constant matrices of ones and zeros. Only the tokens that may leave are
    compared with each other, and they stand side by side in all arrays: then nothing is turned around.
    """
    score, nearest = _nearest_by_product(features, present, sizes, num_prefix_tokens, leave)
    kept = ranks(score, jnp.ones(score.shape[1], bool)) < count - (~leave).sum()
    slot, mask = _slots_by_product(kept, nearest, leave)
    to_leaving = jnp.asarray(np.eye(len(leave))[leave], jnp.float32)
    scores = jnp.where(
        leave[None], jnp.einsum("bl,ln->bn", score, to_leaving, precision="highest"), 3.0
    )
    return (indices_of(mask, slot, count), mask, slot), scores


def _nearest_by_product(features, present, sizes, num_prefix_tokens, leave):
    """For the tokens that may leave: their scores [b l], and which of the others is most like each [b l]."""
    every = np.eye(len(leave), dtype=np.float32)
    to_leaving, to_staying = jnp.asarray(every[leave]), jnp.asarray(every[~leave])
    exact = functools.partial(jnp.einsum, precision="highest")
    # Cosines are of rounded rows in any case, as in `cosines`; distances are not.
    values = _unit_by_product(features) if sizes is None else features
    product = jnp.einsum if sizes is None else exact
    own, other = (
        product("ln,bnf->blf", x.astype(values.dtype), values) for x in (to_leaving, to_staying)
    )
    if sizes is None:
        similarity = jnp.einsum("bsf,blf->bsl", other, own, preferred_element_type=jnp.float32)
    else:
        of_own, of_other = (exact("bn,ln->bl", sizes, x) for x in (to_leaving, to_staying))
        similarity = 1 / (1 + merging_costs(other, own, of_other, of_own))
    if present is not None:
        own_there, other_there = (
            exact("bn,ln->bl", present.astype(jnp.float32), x) > 0.5
            for x in (to_leaving, to_staying)
        )
        similarity = jnp.where(other_there[:, :, None], similarity, -2.0)
    is_patch = np.arange(len(to_staying)) >= num_prefix_tokens
    similarity = jnp.where(is_patch[None, :, None], similarity, -jnp.inf)
    score = 1 - similarity.max(axis=1)
    if present is not None:
        score = jnp.where(own_there, score, -1.0)
    return score, similarity.argmax(axis=1).astype(jnp.int32)


def _slots_by_product(kept, nearest, leave):
    """`Selection.slot` and `.mask`, from which of those that may leave are kept and what each is most like.

    A token's slot is the number of those before it that stay in any case, and of the kept ones before it.
    """
    place = np.arange(len(leave))
    leaving, staying = place[leave], place[~leave]
    stays_before = np.searchsorted(staying, leaving).astype(np.int32)
    every = np.eye(len(leave), dtype=np.float32)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    exact = functools.partial(jnp.einsum, precision="highest")
    row = kept.astype(jnp.bfloat16)

    def kept_before(places):
        return product("bl,lm->bm", row, jnp.asarray(leaving[:, None] < places, jnp.bfloat16))

    of_kept = stays_before[None] + kept_before(leaving)
    of_nearest = nearest + counts(row, stays_before[None, :, None] <= nearest[:, None])
    of_staying = np.arange(len(staying))[None] + kept_before(staying)
    slot = exact("bl,ln->bn", jnp.where(kept, of_kept, of_nearest), every[leave])
    slot = (slot + exact("bs,sn->bn", of_staying, every[~leave])).astype(jnp.int32)
    mask = product("bl,ln->bn", row, jnp.asarray(every[leave], jnp.bfloat16)) > 0.5
    return slot, mask | ~leave[None]


def _unit_by_product(x):
    """Rows of x [b n f] divided by their lengths."""
    return (x.astype(jnp.float32) * jax.lax.rsqrt(_squared_lengths(x) + 1e-12)).astype(x.dtype)


def _squared_lengths(x):
    """Of rows of x [b n f], float32: beside each channel, as a product with ones gives them, or once a row."""
    squares = jnp.square(x.astype(jnp.float32))
    if x.dtype != jnp.bfloat16:
        return squares.sum(axis=2, keepdims=True)
    # The square of a bfloat16 number is the sum of two.
    high = squares.astype(jnp.bfloat16)
    low = (squares - high.astype(jnp.float32)).astype(jnp.bfloat16)
    ones = jnp.ones((x.shape[2], x.shape[2]), jnp.bfloat16)
    product = functools.partial(jnp.einsum, "bnf,fg->bng", preferred_element_type=jnp.float32)
    return product(high, ones) + product(low, ones)


@jax.named_scope("selection")
def weigh_redundancy(
    scores: Scores, features: Float[Array, "b n f"], weight: float, num_prefix_tokens: int
) -> Scores:
    """Scores [b n] that are low for tokens of little attention and for tokens that are like a more attended one.

    scores    [b n], predicted attention, higher is better.
    features  compared by cosine.
    weight    share of redundancy in [0, 1]; attention has the rest.

    Attention and redundancy count by their rank in the example, so that their scales do not matter. A token is compared
    with more attended tokens alone: of two tokens that are alike, only the less attended one gets a low score. A token
    whose score is -inf is last in both, and changes nothing for the others.
    """
    scores = jax.lax.stop_gradient(scores)

    def rank(x):
        return jnp.argsort(jnp.argsort(x, axis=1), axis=1)

    place = rank(-scores)  # 0 for the most attended; of equal scores the first token comes first
    more = place[:, None, :] < place[:, :, None]
    prefix = jnp.arange(scores.shape[1]) < num_prefix_tokens
    similarity = jnp.where(more & ~prefix[None, None], cosines(features, features), -1.0)
    redundancy = jnp.where(jnp.isneginf(scores), 2.0, similarity.max(axis=-1))
    return -((1 - weight) * place + weight * rank(redundancy)).astype(jnp.float32)


def least_after_matching(
    num_tokens: int, num_prefix_tokens: int, first: int = 0, rows: int = 0
) -> int:
    """The smallest `count` that `bipartite_matching` takes: the number of tokens that it cannot bypass."""
    if num_tokens - num_prefix_tokens <= 1:
        return num_tokens
    return num_tokens - int(candidates(num_tokens, num_prefix_tokens, first, rows).sum())


def matching_macs(
    num_tokens: int, num_prefix_tokens: int, width: int, first: int = 0, rows: int = 0
) -> int:
    """Multiply-adds of `bipartite_matching` for one example with features of `width` channels."""
    leaving = int(candidates(num_tokens, num_prefix_tokens, first, rows).sum())
    return leaving * (num_tokens - leaving) * width


def _argmax_patch(similarity: Float[Array, "b n m"], num_prefix_tokens: int) -> Int32[Array, "b n"]:
    patches = similarity[:, :, num_prefix_tokens:]
    return (jnp.argmax(patches, axis=-1) + num_prefix_tokens).astype(jnp.int32)
