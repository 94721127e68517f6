"""The network: sizes, initialisation, drop path, and what it says to sizes that do not fit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import SIZES, forward, random_images, small_model

from tosa_jax.errors import ConfigError
from tosa_jax.models import selector
from tosa_jax.models.cost import gmacs, num_params
from tosa_jax.models.encoder import drop_path_rates
from tosa_jax.models.factory import abstract_model
from tosa_jax.models.layers import DropPath
from tosa_jax.models.params import get_params, set_params, split
from tosa_jax.models.tracing import rngs_of
from tosa_jax.models.variants import variant_config
from tosa_jax.models.vit_config import alternate
from tosa_jax.tasks import create_model


@pytest.mark.parametrize(
    ("size", "rate", "expected", "selectors"),
    [
        ("tiny", None, 1.254, 0.0), ("tiny", 0.7, 1.055, 0.008), ("tiny", 0.5, 0.927, 0.008),
        ("tiny", 0.3, 0.809, 0.008), ("small", None, 4.599, 0.0), ("small", 0.7, 3.893, 0.034),
        ("small", 0.5, 3.425, 0.034), ("small", 0.3, 2.982, 0.034), ("base", None, 17.564, 0.0),
        ("base", 0.7, 14.921, 0.134), ("base", 0.5, 13.135, 0.134), ("base", 0.3, 11.421, 0.134),
    ],
)  # fmt: skip
def test_gmacs_are_those_of_the_arithmetic(size, rate, expected, selectors):
    fields = {"plan": "selective", "keep_rate": rate} if rate else {}
    config = variant_config(f"deit_{size}_patch16_224", **fields)
    assert gmacs(config) == pytest.approx(expected + selectors, abs=0.0011)


def test_reading_fewer_rows_costs_a_selector_less():
    fields = {"keep_rate": 0.5, "plan": "selective"}
    whole, half = (
        variant_config("deit_small_patch16_224", **fields, selector_query_stride=stride)
        for stride in (1, 2)
    )
    # Six selectors, each 6 to 12 to 6 channels for 197 keys of 197 or 99 rows.
    saved = 6 * (6 * 12 + 12 * 6) * 197 * (197 - 99) / 1e9
    assert gmacs(whole) - gmacs(half) == pytest.approx(saved, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "millions"),  # published parameter counts
    [
        ("deit_tiny_patch16_224", 5.717), ("deit_small_patch16_224", 22.051),
        ("deit_base_patch16_224", 86.568), ("deit_base_distilled_patch16_384", 87.630),
        ("vit_large_patch16_224", 304.327),
    ],
)  # fmt: skip
def test_variants_have_their_published_size(name, millions):
    assert num_params(abstract_model(variant_config(name))) / 1e6 == pytest.approx(
        millions, abs=1e-3
    )


def test_parameter_paths_are_timms():
    names = set(get_params(abstract_model(variant_config("deit_tiny_patch16_224"))))
    assert {
        "cls_token", "pos_embed", "patch_embed/proj/kernel", "blocks/0/norm1/scale",
        "blocks/0/attn/qkv/kernel", "blocks/0/attn/proj/bias", "blocks/11/norm2/bias",
        "blocks/11/mlp/fc1/kernel", "blocks/11/mlp/fc2/bias", "norm/scale", "head/kernel",
    } <= names  # fmt: skip
    assert len(names) == 152


def test_initialisation_is_deits():
    params = get_params(create_model("vit", depth=1, rngs=nnx.Rngs(0)))
    for name in ("blocks/0/attn/qkv/kernel", "blocks/0/mlp/fc2/kernel", "head/kernel", "pos_embed"):
        assert float(params[name].std()) == pytest.approx(0.02, rel=0.03), name
        assert abs(float(params[name].mean())) < 2e-4
    bound = (16 * 16 * 3) ** -0.5
    kernel = params["patch_embed/proj/kernel"]
    assert float(jnp.abs(kernel).max()) == pytest.approx(bound, rel=1e-3)
    assert float(kernel.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not params["blocks/0/mlp/fc1/bias"].any()
    assert (params["norm/scale"] == 1).all()


def test_drop_path_drops_whole_branches_and_keeps_the_expectation():
    update = jnp.ones((4000, 2, 3))
    dropped = DropPath(0.3, jax.random.key(0))(update, 0)
    np.testing.assert_array_equal(dropped[:, :1, :1] * jnp.ones((1, 2, 3)), dropped)
    assert float((dropped == 0).mean()) == pytest.approx(0.3, abs=0.03)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.05)
    other = DropPath(0.3, jax.random.key(0))(update, 1)
    assert ((dropped == 0) != (other == 0)).any()
    config = variant_config("vit", drop_path_rate=0.2, depth=5)
    np.testing.assert_allclose(drop_path_rates(config), [0, 0.05, 0.1, 0.15, 0.2])


def test_drop_path_acts_in_training_only():
    model = small_model(drop_path_rate=0.5)
    images, key = random_images(), jax.random.key(0)
    graphdef, params = split(model)
    train = jax.jit(lambda p, x: set_params(graphdef, p)(x, key=key, train=True).logits)
    plain = forward(small_model(), images).logits
    np.testing.assert_allclose(forward(model, images, key).logits, plain, atol=1e-6)
    assert not np.allclose(train(params, images), plain, atol=1e-4)


def test_bfloat16_computes_and_float32_stores():
    model = small_model(dtype="bfloat16", keep_rate=0.5)
    out = forward(model, random_images())
    assert out.logits.dtype == out.tokens.dtype == jnp.bfloat16
    assert {x.dtype for x in get_params(model).values()} == {jnp.dtype("float32")}
    exact = forward(small_model(keep_rate=1.0), random_images()).logits
    rounded = forward(small_model(keep_rate=1.0, dtype="bfloat16"), random_images()).logits
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=0.02)


def test_output_fields_and_other_image_sizes():
    model = small_model(image_size=12, in_chans=2, keep_rate=(0.5, 0.25))
    out = forward(model, jnp.zeros((2, 12, 12, 2)))
    assert out.logits.shape == (2, 10) and out.tokens.shape == (2, 37, 16)
    assert [s.shape for s in out.selected] == [(2, 19), (2, 10)]
    assert all(
        (np.diff(s) > 0).all() and (s[:, 0] == 0).all() for s in map(np.asarray, out.selected)
    )


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("deit_smal_patch16_224", {}, "did you mean 'deit_small_patch16_224'"),
        ("vit", {"keep_rates": 0.5}, "did you mean 'keep_rate'"),
        ("vit", {"keep_rate": 0.0}, "keep_rate=0.0 is not in (0, 1]"),
        ("vit", {"keep_rate": 1.5}, "keep_rate=1.5 is not in (0, 1]"),
        ("vit", {"keep_rate": (0.5, 0.5)}, "2 values, but the plan makes 6 selections"),
        ("vit", {"plan": ("selective",) + ("standard",) * 11}, "plan starts with 'selective'"),
        ("vit", {"plan": ("standard",) * 11}, "plan has 11 layers, but depth=12"),
        ("vit", {"plan": "selektive"}, "did you mean 'selective'"),
        ("vit", {"plan": ("standard", "random", "previous") * 4}, "put a standard layer between"),
        ("vit", {"num_heads": 5}, "num_heads=5 does not divide embed_dim=384"),
        ("vit", {"image_size": 225}, "not a multiple of patch_size=16; the nearest that is: 224"),
        ("vit", {"selector_hidden": 3}, "below 2 * num_heads = 12"),
        ("vit", {"selector_query_stride": 3}, "selector_query_stride"),
        ("vit", {"kernel_size": 2}, "kernel_size=2 must be odd"),
        ("vit", {"map_chunk": -1}, "map_chunk=-1 must be positive"),
        ("vit", {"dtype": "float23"}, "did you mean 'float32'"),
        ("vit", {"task": "depht"}, "task='depht' is unknown"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_one_line(name, fields, says):
    with pytest.raises(ConfigError) as error:
        create_model(name, rngs=nnx.Rngs(0), **fields)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_images_of_another_size_are_refused():
    with pytest.raises(ConfigError, match="made for"):
        small_model()(jnp.zeros((1, 10, 8, 1)))


def test_alternate_is_every_other_layer_or_longer_groups():
    assert alternate("random", 5) == ("standard", "random", "standard", "random", "standard")
    assert alternate("random", 5, 3) == ("standard", "random", "random", "standard", "random")


def test_a_selector_with_more_channels_or_a_wider_kernel_starts_at_the_identity_too():
    logits = jax.random.normal(jax.random.key(0), (2, 2, 5, 5))
    for fields in ({}, {"selector_hidden": 7}, {"kernel_size": 3}):
        selector = small_model(keep_rate=0.5, **fields).kinds[1].selector
        np.testing.assert_allclose(selector(logits), jax.nn.log_softmax(logits), atol=1e-6)
    assert SIZES["num_heads"] == 2


def test_a_selector_computes_the_same_in_either_form(monkeypatch):
    logits, weights = jax.random.normal(jax.random.key(0), (2, 2, 2, 5, 5))
    graphdef, params = split(small_model(keep_rate=0.5).kinds[1].selector)
    keys = jax.random.split(jax.random.key(1), len(params))
    params = {
        k: x + jax.random.normal(key, x.shape)
        for key, (k, x) in zip(keys, params.items(), strict=True)
    }

    def loss(params):
        found = set_params(graphdef, params)(logits)
        return (weights * found).sum(), found

    by_entry = jax.jit(jax.grad(loss, has_aux=True))(params)
    monkeypatch.setattr(selector, "_FEW_MACS", 0)
    by_matrix = jax.jit(lambda p: jax.grad(loss, has_aux=True)(p))(params)
    chex.assert_trees_all_close(by_entry, by_matrix, rtol=1e-5, atol=1e-5)


def test_keys_counted_in_python_are_those_of_flax():
    key = jax.random.key(7)
    ours, theirs = rngs_of(key), nnx.Rngs(params=key)
    for _ in range(3):
        assert (
            jax.random.key_data(ours.params()).tolist()
            == jax.random.key_data(theirs.params()).tolist()
        )
