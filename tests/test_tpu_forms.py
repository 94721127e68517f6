"""What programs for a TPU compute otherwise than for a CPU: kernels and matrix products, beside the plain forms.

Kernels run in Pallas's interpreter here; `platform_dependent` is made to take the TPU's branch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small import random_images, small_model

from tosa_jax.distributed.mesh import BATCH_AXES, MeshConfig, kernels_over, make_mesh
from tosa_jax.models.layers import gelu, project
from tosa_jax.models.params import set_params, split
from tosa_jax.ops import token_matching, tpu_attention
from tosa_jax.ops.attention import attention_and_column_sums
from tosa_jax.ops.reduction import pooled
from tosa_jax.ops.token_selection import gather_tokens, scatter_tokens, select_tokens
from tosa_jax.ops.tpu_attention import Blocks, blocks, supports, supports_selector


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.fixture
def as_tpu(monkeypatch):
    """Every choice by platform falls on the TPU's form, and kernels are interpreted."""

    def take_tpu(*args, tpu=None, default=None, **_):
        return (tpu or default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", take_tpu)
    interpreted = functools.partial(pallas.pallas_call, interpret=True)
    monkeypatch.setattr(tpu_attention.pl, "pallas_call", interpreted)


def reference(query, key, value, *bias):
    """Attention and its map's column sums, as in a textbook."""
    logits = jnp.einsum("bqhc,bkhc->bhqk", query, key) * query.shape[-1] ** -0.5
    for x in bias:
        logits = logits + x[:, None, None]
    attn_map = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bhqk,bkhc->bqhc", attn_map, value), attn_map.sum(axis=2)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([(2, 64, 2), (4, 64, 2), (3, 64, 3), (2, 80, 2), (1, 128, 1)]),
    queries=st.integers(8, 40),
    keys=st.integers(1, 33),
    rows=st.sampled_from([0, 16]),
    biased=st.booleans(),
)
def test_kernels_equal_the_plain_form(heads, queries, keys, rows, biased):
    """Also where the last tile of rows is not full: what lies beyond the end reaches no sum."""
    count, head_dim, block = heads
    shape = count, head_dim
    query, grad = normal(0, 2, queries, *shape), normal(1, 2, queries, *shape)
    key, value = normal(2, 2, keys, *shape), normal(3, 2, keys, *shape)
    bias = (normal(4, 2, keys),) if biased else ()
    with pytest.MonkeyPatch.context() as patch:
        interpreted = functools.partial(pallas.pallas_call, interpret=True)
        patch.setattr(tpu_attention.pl, "pallas_call", interpreted)
        patch.setattr(tpu_attention, "blocks", lambda *_: Blocks(block, rows or queries))
        found = tpu_attention._forward(query, key, value, *bias, summed=True)
        grads = tpu_attention._backward(query, key, value, grad, *bias)
    for ours, theirs in zip(found, reference(query, key, value, *bias), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    wanted = jax.vjp(lambda *x: reference(*x)[0], query, key, value, *bias)[1](grad)
    for ours, theirs in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(("rows", "stride"), [(0, 1), (32, 1), (0, 2), (32, 4), (32, 8)])
def test_the_selector_in_a_kernel_is_the_selector(rows, stride, monkeypatch):
    """Column sums of the predicted map, over whole groups of rows and over a last one that is not full.

    With a stride, also where a tile has fewer of the rows that are read than a group.
    """
    interpreted = functools.partial(pallas.pallas_call, interpret=True)
    monkeypatch.setattr(tpu_attention.pl, "pallas_call", interpreted)
    if rows:
        monkeypatch.setattr(tpu_attention, "selector_blocks", lambda *_: Blocks(2, rows))
    query, key, value = (normal(i, 2, 37, 2, 64) for i in range(3))
    expand, contract = normal(3, 2, 5), normal(4, 5, 2)
    first, second = normal(5, 5), normal(6, 2)
    layers = tpu_attention._for_groups(expand, first, contract, jnp.float32)
    out, sums = tpu_attention._selected(query, key, value, *layers, stride=stride)
    logits = jnp.einsum("bqhc,bkhc->bqkh", query, key) / 8
    hidden = jax.nn.relu(logits @ expand + first[None, None, None])
    found = jax.nn.softmax(hidden @ contract + second[None, None, None], axis=2)
    np.testing.assert_allclose(out, reference(query, key, value)[0], atol=1e-5)
    found = found[:, ::stride].sum(axis=1).transpose(0, 2, 1)
    np.testing.assert_allclose(sums, found, atol=1e-5)


def test_a_model_of_kernels_chooses_and_answers_as_without_them(as_tpu, monkeypatch):
    """ToSA in bfloat16: logits no farther from float32's than those of the plain form, and nearly the same tokens."""
    fields = {"plan": "selective", "keep_rate": 0.5, "embed_dim": 128, "depth": 2}
    images = random_images(2)

    def run(dtype):
        graphdef, params = split(small_model(**fields, dtype=dtype))
        return jax.jit(lambda p, x: set_params(graphdef, p)(x, tokens=False))(params, images)

    exact, kernels = run("float32"), run("bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", lambda *x, default, **_: default(*x))
        plain = run("bfloat16")

    def error(out):
        return float(jnp.abs(out.logits.astype(jnp.float32) - exact.logits).max())

    assert error(kernels) <= 1.5 * error(plain) + 1e-3
    same = (kernels.selected[0][:, :, None] == exact.selected[0][:, None]).any(axis=2).mean()
    assert same >= 0.85


def test_bfloat16_kernels_are_as_near_as_bfloat16_is(as_tpu):
    arrays = [normal(i, 2, 24, 2, 64, dtype=jnp.bfloat16) for i in range(4)]
    query, key, value, grad = arrays
    out, sums = attention_and_column_sums(query, key, value)
    (wanted, wanted_sums), back = jax.vjp(reference, *(x.astype(jnp.float32) for x in arrays[:3]))
    np.testing.assert_allclose(out.astype(jnp.float32), wanted, atol=2e-2)
    np.testing.assert_allclose(sums, wanted_sums, atol=2e-2)
    grads = jax.vjp(lambda *x: attention_and_column_sums(*x)[0], *arrays[:3])[1](grad)
    zeros = jnp.zeros_like(wanted_sums)
    for ours, theirs in zip(grads, back((grad.astype(jnp.float32), zeros)), strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=4e-2)


def test_kernels_work_on_divided_arrays(as_tpu):
    """Examples over four devices, heads over two: each device has its own part, and the results are the same."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    arrays = [normal(i, 4, 16, 4, 64, dtype=jnp.bfloat16) for i in range(3)]
    divided = jax.device_put(arrays, NamedSharding(mesh, P(BATCH_AXES, None, "model")))

    layers = normal(3, 4, 8), normal(4, 8), normal(5, 8, 4)

    def loss(*arrays):
        out, sums = attention_and_column_sums(*arrays)
        selected = tpu_attention.attention_and_selector_sums(*arrays, *layers)  # it mixes heads
        return (out.astype(jnp.float32) ** 2).mean(), (sums, selected)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True, argnums=(0, 1, 2)))
    wanted = step(*arrays)
    with kernels_over(mesh):
        found = jax.jit(lambda *x: step.__wrapped__(*x))(*divided)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=1e-6)


def test_blocks_fit_or_there_are_none():
    assert blocks(197, 197, 6, 64) == Blocks(6, 197)
    for tokens, heads, head_dim in [(577, 12, 64), (1370, 24, 64), (1201, 6, 64), (257, 16, 80)]:
        found = blocks(tokens, tokens, heads, head_dim)
        assert found is not None and heads % found.heads == 0
        assert tpu_attention._bytes(found.rows, tokens, found.heads, head_dim) <= 12 * 2**20
        assert (found.heads * head_dim) % 128 == 0
    assert blocks(9000, 9000, 6, 64) is None


def test_other_shapes_have_no_kernel():
    heads = normal(0, 1, 16, 2, 64)
    assert supports(heads.astype(jnp.bfloat16), heads)
    assert not supports(heads, heads)  # float32 stays exact
    assert not supports(heads[:, :1].astype(jnp.bfloat16), heads)
    narrow = normal(0, 1, 16, 2, 16, dtype=jnp.bfloat16)
    assert not supports(narrow, narrow)
    half = heads.astype(jnp.bfloat16)
    assert supports_selector(half, half, 8)
    assert not supports_selector(half, half, 20_000)  # its matrices do not fit


SCORES = {
    "normal": lambda: normal(0, 3, 23),
    "ties": lambda: jnp.asarray(np.random.default_rng(1).integers(0, 3, (3, 23)), jnp.float32),
    "equal": lambda: jnp.zeros((3, 23)),
    "infinite and nan": lambda: normal(2, 3, 23).at[:, 5].set(jnp.nan).at[:, 7].set(-jnp.inf),
}


@pytest.mark.parametrize("scores", SCORES)
def test_selection_without_sorting_is_the_same(scores, as_tpu, monkeypatch):
    values = SCORES[scores]()
    for count in (2, 9, 23, 30):
        found = select_tokens(values, count, 2)
        with monkeypatch.context() as patch:
            patch.setattr(jax.lax, "platform_dependent", lambda *x, default, **_: default(*x))
            wanted = select_tokens(values, count, 2)
        for ours, theirs in zip(found[:3], wanted[:3], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def moved_tokens():
    """Everything that gathers, places, groups and matches tokens, with the gradients."""
    tokens, keys = normal(0, 2, 21, 8), normal(1, 2, 21, 2, 4)
    selection = select_tokens(normal(2, 2, 21), 9, 1)
    matched, scores = token_matching.bipartite_matching(token_matching.mean_of_heads(keys), 15, 1)
    stand_in = token_matching.with_representatives(tokens, selection, 1)

    def outputs(tokens):
        taken = gather_tokens(tokens, selection)
        group = pooled(matched, jnp.ones((2, 21)))
        return {
            "taken": taken,
            "placed": scatter_tokens(tokens, taken * 2, selection),
            "merged": group.merge(tokens),
            "spread": group.spread(group.merge(tokens) ** 2),
            "summed": token_matching.sum_groups(tokens, stand_in),
        }

    values, back = jax.vjp(outputs, tokens)
    return values, back(values), matched, scores, stand_in


def test_moving_tokens_by_matrix_products_is_the_same(as_tpu, monkeypatch):
    found = jax.jit(moved_tokens)()
    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", lambda *x, default, **_: default(*x))
        wanted = jax.jit(lambda: moved_tokens())()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)


def test_lengths_in_bfloat16_are_those_of_float32():
    x = normal(0, 2, 5, 64, dtype=jnp.bfloat16)
    found = token_matching._squared_lengths(x)[:, :, 0]
    wanted = np.square(np.asarray(x, np.float64)).sum(axis=2)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_projection_in_parts_has_the_gradient_of_the_whole(as_tpu):
    x, kernel, bias = normal(0, 2, 5, 4), normal(1, 4, 12), normal(2, 12)
    grads = tuple(normal(i, 2, 5, 4) for i in range(3, 6))
    out, back = jax.vjp(lambda *a: project(*a, 3), x, kernel, bias)
    plain, plain_back = jax.vjp(lambda x, w, b: x @ w + b[None, None], x, kernel, bias)
    np.testing.assert_allclose(jnp.concatenate(out, axis=2), plain, atol=1e-6)
    for ours, theirs in zip(back(grads), plain_back(jnp.concatenate(grads, axis=2)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_gelu_in_bfloat16_is_exact_to_its_own_rounding():
    x = jnp.linspace(-12, 12, 4001).astype(jnp.bfloat16)[None, None]
    exact = jax.nn.gelu(x.astype(jnp.float32), approximate=False)
    error = jnp.abs(gelu(x).astype(jnp.float32) - exact)
    assert float((error - jnp.abs(exact) * 2**-8).max()) < 4e-5
    tanh = jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(jnp.bfloat16)
    assert float(error.mean()) <= float(jnp.abs(tanh.astype(jnp.float32) - exact).mean())


@pytest.mark.parametrize(
    ("plan", "fields"),
    [("", {}), ("previous", {}), ("selective", {}), ("redundancy", {"budget": "linear"})],
)
def test_logits_do_not_need_the_other_tokens(plan, fields):
    """Without `Output.tokens` the last layer works for the class token alone, and the logits are the same."""
    graphdef, params = split(small_model(plan=plan, keep_rate=0.75, **fields))

    @jax.jit
    def outputs(params, images):
        model = set_params(graphdef, params)
        return model(images), model(images, tokens=False)

    whole, part = outputs(params, random_images(2))
    assert part.tokens is None
    np.testing.assert_allclose(part.logits, whole.logits, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, part.selected, whole.selected)
