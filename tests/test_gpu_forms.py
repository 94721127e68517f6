"""What programs for an NVIDIA GPU compute otherwise: kernels in Pallas's interpreter, beside the plain form.

`results/gpu_exactness.py` compares the same on a GPU.
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
from tosa_jax.models.params import set_params, split
from tosa_jax.ops import attention as forms
from tosa_jax.ops import gpu_attention
from tosa_jax.ops.gpu_attention import Cut, is_short, pieces, supports_selector


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.fixture
def interpreted(monkeypatch):
    call = functools.partial(pallas.pallas_call, interpret=True)
    monkeypatch.setattr(gpu_attention.pl, "pallas_call", call)
    attention = jax.nn.dot_product_attention

    def stands_in(*arrays, implementation=None, **fields):
        """As JAX's function, which raises where it would not train."""
        if implementation == "cudnn" and any(x.shape[1] % 2 for x in arrays):
            raise NotImplementedError("odd")
        return attention(*arrays, implementation="xla", **fields)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stands_in)


@pytest.fixture
def as_gpu(interpreted, monkeypatch):
    """Every choice by platform falls on the GPU's form."""

    def take_gpu(*args, cuda=None, default=None, **_):
        return (cuda or default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", take_gpu)
    monkeypatch.setattr(forms, "_has_cuda", lambda: True)


def reference(query, key, value, expand=None, bias=None, contract=None):
    """Attention, its map's column sums, and those of the map that a selector predicts, as in a textbook."""
    logits = jnp.einsum("bqhc,bkhc->bhqk", query, key) * query.shape[-1] ** -0.5
    attn_map = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("bhqk,bkhc->bqhc", attn_map, value)
    if expand is None:
        return out, attn_map.sum(axis=2)
    channels = jnp.einsum("bhqk,hf->bfqk", logits, expand) + bias[None, :, None, None]
    found = jnp.einsum("bfqk,fh->bhqk", jax.nn.relu(channels), contract)
    return out, attn_map.sum(axis=2), jax.nn.softmax(found, axis=-1).sum(axis=2)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([1, 3, 6, 20]),
    channels=st.sampled_from([16, 24, 64]),
    queries=st.integers(1, 90),
    keys=st.sampled_from([1, 15, 70, 99, 197, 300]),
)
def test_kernels_equal_the_plain_form(heads, channels, queries, keys):
    """Also where the last tiles of rows, keys and heads are not full: what lies beyond the end reaches no sum.

    A selector's logits are rounded to half precision, so its sums differ by that.
    """
    query = normal(0, 1, queries, heads, channels)
    key, value = normal(1, 1, keys, heads, channels), normal(2, 1, keys, heads, channels)
    hidden = 2 * heads + 1
    layers = normal(3, heads, hidden) * 0.3, normal(4, hidden), normal(5, hidden, heads) * 0.2
    with pytest.MonkeyPatch.context() as patch:
        call = functools.partial(pallas.pallas_call, interpret=True)
        patch.setattr(gpu_attention.pl, "pallas_call", call)
        logits = gpu_attention._logits(query, key)
        selected = gpu_attention._selector_sums(logits, *layers, keys=keys)
        short = {
            report: gpu_attention._attention(query, key, value, report)
            for report in ("", "sums", "logits")
            if keys <= 256
        }
    wanted = jax.jit(reference)(query, key, value, *layers)
    np.testing.assert_allclose(selected, wanted[2], atol=4e-3 * queries**0.5)
    for found in short.values():
        np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
    if short:
        np.testing.assert_allclose(short["sums"][1], wanted[1], atol=1e-5)
        ours, theirs = (x[:, :, :heads, :keys] for x in (short["logits"][1], logits))
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("call", ["attention", "cudnn_attention", "attention_and_column_sums"])
@pytest.mark.parametrize("tokens", [20, 21])
def test_backward_is_that_of_attention_for_odd_numbers_too(call, tokens, interpreted):
    arrays = [normal(i, 2, tokens, 2, 16) for i in range(3)]
    grad = normal(3, 2, tokens, 2, 16)

    def out(*arrays):
        found = getattr(gpu_attention, call)(*arrays)
        return found[0] if isinstance(found, tuple) else found

    found, pull = jax.vjp(out, *arrays)
    wanted, wanted_pull = jax.vjp(lambda *x: reference(*x)[0], *arrays)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for ours, theirs in zip(pull(grad), wanted_pull(grad), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("plan", "own"),
    [("selective", {}), ("selective", {"selector_query_stride": 2}), ("previous", {})],
)
def test_a_model_of_kernels_chooses_and_learns_as_without_them(plan, own, as_gpu, monkeypatch):
    """In bfloat16: logits and gradients as near to float32's as those of the plain form, and nearly the same tokens."""
    fields = {"plan": plan, "keep_rate": 0.5, "embed_dim": 64, "depth": 2} | own
    images = random_images(2)

    def run(dtype):
        graphdef, params = split(small_model(**fields, dtype=dtype))

        def loss(params):
            out = set_params(graphdef, params)(images)
            return (out.logits.astype(jnp.float32) ** 2).sum(), out

        grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
        flat = [x.ravel().astype(jnp.float32) for x in jax.tree.leaves(grads)]
        return out.logits.astype(jnp.float32), jnp.concatenate(flat), out.selected[0]

    exact, kernels = run("float32"), run("bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", lambda *x, default, **_: default(*x))
        plain = run("bfloat16")
    for i in (0, 1):
        error, other = (float(jnp.linalg.norm(x[i] - exact[i])) for x in (kernels, plain))
        assert error <= 1.5 * other + 1e-3 * float(jnp.linalg.norm(exact[i]))
    assert (kernels[2][:, :, None] == exact[2][:, None]).any(axis=2).mean() >= 0.85


def test_kernels_work_on_divided_arrays(as_gpu):
    """Examples over four devices, heads over two, which a selector mixes: the results are those of one device."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    arrays = [normal(i, 4, 16, 4, 16, dtype=jnp.bfloat16) for i in range(3)]
    layers = normal(3, 4, 8), normal(4, 8), normal(5, 8, 4)
    divided = jax.device_put(arrays, NamedSharding(mesh, P(BATCH_AXES, None, "model")))

    @jax.jit
    def outputs(*arrays):
        selected = gpu_attention.attention_and_selector_sums(*arrays, *layers)
        return selected, forms.attention_and_column_sums(*arrays)

    wanted = outputs(*arrays)
    with kernels_over(mesh):
        found = jax.jit(lambda *x: outputs.__wrapped__(*x))(*divided)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=1e-5)


def test_huge_logits_stay_finite(interpreted):
    """Beyond what half precision holds, they are cut off there."""
    arrays = [1e4 * normal(i, 1, 9, 2, 16) for i in range(3)]
    layers = normal(3, 2, 4), normal(4, 4), normal(5, 4, 2)
    out, sums = gpu_attention.attention_and_selector_sums(
        *(x.astype(jnp.bfloat16) for x in arrays), *layers
    )
    assert np.isfinite(out.astype(jnp.float32)).all()
    np.testing.assert_allclose(sums.sum(axis=2), 9, rtol=1e-3)


def test_pieces_cover_and_little_more():
    for count in range(1, 700):
        for least, largest, most in ((16, 256, 3), (64, 512, 2)):
            found = pieces(count, least, largest, most)
            assert count <= sum(found) < count + max(least, largest // 2**most) + least
            assert all(least <= x <= largest and x.bit_count() == 1 for x in found)
            assert sum(x < largest for x in found) <= most
    assert pieces(197, 16, 256, 3) == (128, 64, 16)
    assert Cut.of(197, 6) == Cut(widths=(256,), heads=8, slots=16)
    assert Cut.of(577, 20) == Cut(widths=(512, 128), heads=32, slots=32)


def test_other_shapes_have_no_kernel():
    heads = normal(0, 1, 16, 2, 64, dtype=jnp.bfloat16)
    assert is_short(heads, heads) and supports_selector(heads, heads)
    assert not is_short(heads.astype(jnp.float32), heads)  # float32 stays exact
    assert not is_short(heads, jnp.zeros((1, 257, 2, 64)))
    assert not supports_selector(heads, jnp.zeros((1, 1600, 2, 64)))
    wide = jnp.zeros((1, 16, 2, 80), jnp.bfloat16)
    assert not is_short(wide, wide) and supports_selector(wide, wide)
