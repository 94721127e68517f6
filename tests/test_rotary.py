"""Rotary positions travel with the tokens: however tokens are moved, selected or merged, each keeps its own place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tosa_jax
from tosa_jax.errors import ConfigError
from tosa_jax.models.bypass_fit import fit_bypass
from tosa_jax.models.params import set_params, split
from tosa_jax.models.token_state import TokenState
from tosa_jax.ops.reduction import Reduction, TokenWeights, pooled
from tosa_jax.ops.rotary import Rotary, axial_rotary, turn
from tosa_jax.ops.token_selection import select_tokens, with_one_hot

SMALL = {"embed_dim": 32, "depth": 4, "num_heads": 2, "image_size": (32, 48), "patch_size": 8}
SMALL |= {"reg_tokens": 2, "layer_scale": 1.0}
PREFIX, GRID, N = 3, (4, 6), 27
IMAGES = np.random.default_rng(0).standard_normal((2, 32, 48, 3), np.float32)


FAMILIES = {"dinov3": "vit_small_patch16_dinov3", "eva02": "eva02_base_patch14_224"}


def model_of(form: str = "dinov3", **fields):
    fields = SMALL | {"global_pool": "token"} | fields
    return tosa_jax.create_model(FAMILIES[form], rngs=nnx.Rngs(0), **fields)


def run(model, images=IMAGES):
    graphdef, params = split(model)
    return jax.jit(lambda p, x: set_params(graphdef, p)(x, key=jax.random.key(0)))(params, images)


@pytest.mark.parametrize("form", FAMILIES)
def test_the_product_of_a_query_and_a_key_knows_only_how_far_apart_they_are(form: str) -> None:
    """Both axes, in patches; and prefix tokens are not turned."""
    rotary, neighbours = axial_rotary(GRID, 8, 100.0, PREFIX, form), form == "eva02"
    query, key = np.random.default_rng(1).standard_normal((2, 1, 1, 1, 8), np.float32)
    queries, keys = (
        turn(jnp.broadcast_to(x, (1, N, 1, 8)), rotary, neighbours) for x in (query, key)
    )
    np.testing.assert_array_equal(queries[:, :PREFIX], np.broadcast_to(query, (1, PREFIX, 1, 8)))
    products = np.einsum("nc,mc->nm", queries[0, PREFIX:, 0], keys[0, PREFIX:, 0])
    products = products.reshape(*GRID, *GRID)
    for down, right in ((1, 0), (0, 1), (2, 3)):
        moved = products[down:, right:, down:, right:]
        kept = products[: GRID[0] - down, : GRID[1] - right, : GRID[0] - down, : GRID[1] - right]
        np.testing.assert_allclose(moved, kept, atol=1e-5)
    assert np.ptp(products[0, 0]) > 0.1


@pytest.mark.parametrize("form", FAMILIES)
def test_permuting_patches_with_their_places_permutes_the_output(form: str) -> None:
    model = model_of(form)
    order = np.random.default_rng(2).permutation(N - PREFIX)
    order = np.concatenate([np.arange(PREFIX), PREFIX + order])
    rotary = model.rotary(GRID)

    def layers(tokens, rotary):
        for block in model.blocks:
            tokens, _ = block(tokens, rotary=rotary)
        return tokens

    tokens = model.embed(jnp.asarray(IMAGES))
    whole = jax.jit(layers)(tokens, rotary)
    moved = jax.jit(layers)(tokens[:, order], Rotary(*(x[:, order] for x in rotary)))
    np.testing.assert_allclose(moved, whole[:, order], atol=1e-5)
    without = jax.jit(layers)(tokens[:, order], rotary)
    assert np.abs(without - whole[:, order]).max() > 1e-4  # the places do matter


@pytest.mark.parametrize("hot", [False, True])
def test_new_tokens_have_their_own_place_or_the_means_of_their_groups(hot: bool) -> None:
    rotary, rng = axial_rotary(GRID, 8, 100.0, PREFIX), np.random.default_rng(3)
    tokens = jnp.asarray(rng.standard_normal((2, N, 4), np.float32))
    chosen = select_tokens(jnp.asarray(rng.standard_normal((2, N), np.float32)), 12, PREFIX)
    chosen = with_one_hot(chosen, jnp.dtype("bfloat16")) if hot else chosen
    state = TokenState(tokens, grid_rotary=rotary)
    sines, slots = np.asarray(rotary.sin)[0], np.asarray(chosen.slot)
    means = np.stack([[sines[slot == s].mean(axis=0) for s in range(12)] for slot in slots])
    for reduction in (Reduction(chosen), pooled(chosen, jnp.ones((2, N)))):
        expected = sines[np.asarray(chosen.indices)] if reduction.weights is None else means
        inside = state.opened(tokens[:, :12], reduction)
        np.testing.assert_allclose(inside.rotary.sin, expected, atol=1e-6)
        # A second choice, among those that the first one left.
        again = select_tokens(jnp.arange(12.0)[None].repeat(2, 0), 5, PREFIX)
        twice = inside.opened(tokens[:, :5], Reduction(again))
        np.testing.assert_allclose(twice.rotary.sin[:, -1], expected[:, -1], atol=1e-6)
        if reduction.weights is None:
            assert twice.restored().rotary is rotary
    weights = jnp.full((2, 2, N), 0.01).at[:, 0, 20].set(0.5).at[:, 1, 4].set(0.5)
    merged = state.reduced(tokens[:, :2], Reduction(TokenWeights(weights)))
    total = float(weights[0, 0].sum())
    mean = (0.01 * rotary.cos[0].sum(axis=0) + 0.49 * rotary.cos[0, 20]) / total
    np.testing.assert_allclose(merged.rotary.cos[1, 0], mean, atol=1e-5)
    assert merged.restored_grid().rotary is rotary


def test_selection_of_every_token_equals_the_dense_network_in_every_way_to_run_a_block() -> None:
    small = {"depth": 2, "keep_rate": 1.0}
    dense = run(model_of(**small)).tokens
    assert np.ptp(np.asarray(dense)) > 1
    for kind in ("selective", "selective_fit", "redundancy", "true_map", "worst_bypass"):
        found = run(model_of(plan=("standard", kind), **small)).tokens
        np.testing.assert_allclose(found, dense, atol=2e-5, err_msg=kind)


@pytest.mark.parametrize("form", FAMILIES)
def test_selected_tokens_attend_from_where_they_are(form: str) -> None:
    """A layer on selected tokens gives what masking all other keys gives."""
    model = model_of(form, plan=("standard", "previous", "standard", "standard"), keep_rate=0.5)
    out = run(model)
    tokens, rotary = model.embed(jnp.asarray(IMAGES)), model.rotary(GRID)
    tokens, _ = model.blocks[0](tokens, rotary=rotary)
    seen = np.zeros((2, N), bool)
    np.put_along_axis(seen, np.asarray(out.selected[0]), True, axis=1)

    def masked(query, key, value):
        logits = jnp.einsum("bqhc,bkhc->bhqk", query, key) * query.shape[-1] ** -0.5
        attn_map = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -1e30))
        return jnp.einsum("bhqk,bkhc->bqhc", attn_map, value), None

    moved, _ = model.blocks[1](tokens, masked, rotary=rotary)
    tokens = jnp.where(seen[:, :, None], moved, tokens)
    for block in list(model.blocks)[2:]:
        tokens, _ = block(tokens, rotary=rotary)
    np.testing.assert_allclose(out.tokens, model.norm(tokens), atol=2e-5)


def test_a_group_of_tokens_that_are_alike_is_paid_the_mean_of_what_they_are_paid() -> None:
    """In logits; a place of one of them, or their mean place, pays it otherwise."""
    rotary, rng = axial_rotary(GRID, 8, 100.0, 0), np.random.default_rng(5)
    n = rotary.cos.shape[1]
    query, key = jnp.asarray(rng.standard_normal((2, 1, 1, 1, 8), np.float32))
    keys = turn(jnp.broadcast_to(key, (1, n, 1, 8)), rotary)
    apart = np.einsum("bqhc,bkhc->bk", query, keys)[0]
    weights = jnp.asarray(rng.uniform(size=(1, 1, n)), jnp.float32)
    for scale in (1.0, 1 / weights.sum()):  # a sum, as EViT's fused token, or a mean
        group = Reduction(TokenWeights(weights * scale)).places(rotary)
        together = np.einsum("bqhc,bkhc->bk", query, turn(key, group))[0, 0]
        assert together == pytest.approx(float(np.average(apart, weights=weights[0, 0])), abs=1e-4)


@pytest.mark.parametrize("plan", ["standard", "redundancy"])
def test_the_last_layer_cut_off_at_the_class_token_gives_the_same(plan: str) -> None:
    model = model_of(num_classes=4, depth=2, plan=("standard", plan), keep_rate=0.7)

    def logits(images):
        return model(images, tokens=True).logits, model(images, tokens=False).logits

    whole, cut = jax.jit(logits)(jnp.asarray(IMAGES))
    np.testing.assert_allclose(cut, whole, atol=1e-5)


def test_scanned_layers_and_recomputed_ones_compute_the_same() -> None:
    plan = ("standard", "previous", "standard", "previous")
    plain = run(model_of(plan=plan)).tokens
    for fields in ({"scan_layers": True}, {"remat": "full"}):
        np.testing.assert_allclose(run(model_of(plan=plan, **fields)).tokens, plain, atol=1e-5)


def test_a_block_that_is_run_without_places_says_so() -> None:
    model = model_of()
    with pytest.raises(ConfigError, match=r"pass rotary=state\.rotary"):
        model.blocks[0](model.embed(jnp.asarray(IMAGES)))


def test_maps_are_fitted_to_what_the_network_with_its_places_does() -> None:
    plan = ("standard", "predicted_bypass", "standard", "predicted_bypass")
    model = model_of(plan=plan, keep_rate=0.5, bypass="low_rank", bypass_rank=32)
    assert all(np.isfinite(x).all() for x in fit_bypass(model, [jnp.asarray(IMAGES)]).values())


def test_depth_of_images_of_another_size_has_their_places() -> None:
    fields = {"task": "depth", "decoder_dim": 8}
    model = model_of(**fields)
    turned = np.ascontiguousarray(IMAGES.transpose(0, 2, 1, 3))  # as many patches, in another grid
    made_for = model_of(**fields, image_size=(48, 32))
    np.testing.assert_allclose(run(model, turned).depth, run(made_for, turned).depth, atol=1e-6)
