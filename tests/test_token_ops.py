"""Selection, gather, scatter and the walk over a map, against plain forms."""

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tosa_jax.ops import attention, reduction, token_matching, token_selection


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    ("patches", "prefix", "rate", "count"),
    [(196, 1, 0.5, 99), (196, 1, 0.7, 139), (10, 2, 0.7, 9), (196, 1, 1.0, 197), (3, 0, 0.01, 1)],
)
def test_counts_are_ceilings_that_float_noise_does_not_lift(patches, prefix, rate, count):
    assert token_selection.num_selected(patches, prefix, rate) == count


def test_selects_prefix_and_best_patches_in_raster_order():
    scores = jnp.array([[0.0, -9.0, 5.0, 1.0, 7.0, 1.0]])  # two prefix tokens of low score
    chosen = token_selection.select_tokens(scores, 5, 2)
    np.testing.assert_array_equal(chosen.indices, [[0, 1, 2, 3, 4]])  # the tie goes to index 3
    np.testing.assert_array_equal(chosen.mask, [[True] * 5 + [False]])


@settings(max_examples=8, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2), st.floats(0.05, 1.0), st.integers(0, 99))
def test_gather_then_scatter_is_the_identity(patches, prefix, rate, seed):
    count = token_selection.num_selected(patches, prefix, rate)
    tokens = random(seed, 2, patches + prefix, 3)
    chosen = token_selection.select_tokens(random(seed + 1, 2, patches + prefix), count, prefix)
    selected = token_selection.gather_tokens(tokens, chosen)
    chex.assert_shape(selected, (2, count, 3))
    np.testing.assert_array_equal(token_selection.scatter_tokens(tokens, selected, chosen), tokens)
    changed = token_selection.scatter_tokens(tokens, selected + 1, chosen)
    np.testing.assert_array_equal(changed, tokens + chosen.mask[:, :, None].astype(float))


def test_derivatives_are_those_of_plain_indexing():
    tokens, update, weight = random(0, 2, 9, 3), random(1, 2, 5, 3), random(2, 2, 9, 3)
    chosen = token_selection.select_tokens(random(3, 2, 9), 5, 1)
    rows = jnp.arange(2)[:, None]

    def ours(tokens, update):
        selected = token_selection.gather_tokens(tokens, chosen) * update
        return (jnp.sin(token_selection.scatter_tokens(tokens, selected, chosen)) * weight).sum()

    def plain(tokens, update):
        selected = tokens[rows, chosen.indices] * update
        return (jnp.sin(tokens.at[rows, chosen.indices].set(selected)) * weight).sum()

    chex.assert_trees_all_close(
        jax.grad(ours, (0, 1))(tokens, update), jax.grad(plain, (0, 1))(tokens, update), atol=1e-6
    )


def test_no_gradient_passes_through_the_choice():
    def loss(scores):
        chosen = token_selection.select_tokens(scores, 4, 1)
        return token_selection.gather_tokens(scores[:, :, None], chosen).sum()

    grad = jax.grad(lambda s: loss(s) - loss(jax.lax.stop_gradient(s)))(random(0, 1, 6))
    assert set(np.unique(grad)) <= {0.0, 1.0}  # what was gathered, nothing for having been best
    assert grad.sum() == 4


def matrix_products(jaxpr):
    """The matrix products of a program, those of programs that it calls included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from matrix_products(inner)


def test_matrix_products_that_move_tokens_are_exact_in_float32():
    """A TPU's default rounds both sides to bfloat16, and so would every token that is only moved."""
    scores, weights = random(0, 2, 9), reduction.TokenWeights(jnp.ones((2, 5, 9)) / 9)

    def loss(tokens):
        chosen = token_selection.with_one_hot(
            token_selection.select_tokens(scores, 5, 1), tokens.dtype
        )
        selected = token_selection.gather_tokens(tokens, chosen)
        placed = token_selection.scatter_tokens(tokens, selected, chosen)
        mixed = reduction.Reduction(weights)
        sums = token_matching.sum_groups(placed, chosen)
        return (sums**2).sum() + (mixed.spread(mixed.merge(placed)) ** 2).sum()

    program = jax.make_jaxpr(jax.grad(loss))(random(1, 2, 9, 3))
    # Counts of ones and zeros are products of bfloat16, which are exact as they are.
    products = [
        x
        for x in matrix_products(program.jaxpr)
        if any(operand.aval.dtype == jnp.float32 for operand in x.invars)
    ]
    assert len(products) >= 5
    exact = jax.lax.Precision.HIGHEST
    assert all(x.params["precision"] == (exact, exact) for x in products), products


def plain_walk(query, key, value):
    logits = jnp.einsum("bqhc,bkhc->bhqk", query, key) / query.shape[-1] ** 0.5
    attn_map = jax.nn.softmax(logits)
    return jnp.einsum("bhqk,bkhc->bqhc", attn_map, value), attn_map.sum(axis=2), logits


@pytest.mark.parametrize("chunk", [None, 1, 3, 5, 10, 11, 64])
def test_walk_equals_the_whole_map_in_any_chunks_forward_and_backward(chunk):
    query, key, value = (random(i, 2, 11, 3, 4) for i in range(3))
    extra = random(4, 2, 11)

    def summarise(logits, attn_map, rows):
        return {"sums": attn_map.sum(axis=2), "rows": jnp.einsum("bhqk,bq->bhk", logits, rows)}

    def walked(query, key, value):
        return attention.walk_map(query, key, value, summarise, rows=extra, chunk=chunk)

    def plain(query, key, value):
        out, sums, logits = plain_walk(query, key, value)
        return out, {"sums": sums, "rows": jnp.einsum("bhqk,bq->bhk", logits, extra)}

    def loss(form):
        def value_of(*args):
            out, sums = form(*args)
            return jnp.sin(out).sum() + jnp.cos(sums["sums"]).sum() + jnp.sin(sums["rows"]).sum()

        return value_of

    args = (query, key, value)
    chex.assert_trees_all_close(jax.jit(walked)(*args), plain(*args), atol=1e-5)
    chex.assert_trees_all_close(
        jax.grad(loss(walked), (0, 1, 2))(*args), jax.grad(loss(plain), (0, 1, 2))(*args), atol=1e-4
    )


@pytest.mark.compiler
def test_a_chunked_walk_never_holds_the_map():
    query = jax.ShapeDtypeStruct((1, 256, 4, 8), jnp.float32)

    def temporaries(chunk):
        def loss(query):
            def summarise(logits, attn_map, rows):
                return attn_map.sum(axis=2)

            out, sums = attention.walk_map(query, query, query, summarise, chunk=chunk)
            return (out**2).sum() + (sums**2).sum()

        compiled = jax.jit(jax.grad(loss)).lower(query).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole_map = 4 * 256 * 256 * 4
    assert temporaries(None) > whole_map
    assert temporaries(16) < 0.5 * whole_map


def test_overlap_counts_patches_only():
    truth = jnp.array([[9.0, 4.0, 3.0, 2.0, 1.0]])
    found = jnp.array([[0.0, 4.0, 1.0, 3.0, 2.0]])
    np.testing.assert_allclose(token_selection.overlap(found, truth, 3, 1), [0.5])
    np.testing.assert_allclose(token_selection.overlap(found, truth, 1, 1), [1.0])
