"""Rivals and oracles choose what their definitions say, computed here by hand, and cost what is said of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import forward, random_images, small_model

from tests.test_layer_kinds import noisy
from tosa_jax.errors import ConfigError
from tosa_jax.models import cost
from tosa_jax.models.bypass_fit import fit_bypass
from tosa_jax.models.params import get_params, set_params, split

LOW_RANK = {"bypass": "low_rank", "bypass_rank": 4}


def planned(kind: str, params: dict | None = None, **fields):
    """A standard layer and one of `kind`, with given parameters."""
    fields = {"depth": 2, "plan": ("standard", kind), "keep_rate": 0.4} | fields
    model = small_model(**fields)
    return set_params(split(model)[0], get_params(model) | (params or {}))


def attend_and_show(query, key, value):
    logits = jnp.einsum("bqhc,bkhc->bhqk", query, key) / query.shape[-1] ** 0.5
    attn_map = jax.nn.softmax(logits)
    return jnp.einsum("bhqk,bkhc->bqhc", attn_map, value), attn_map


@pytest.fixture(scope="module")
def dense():
    """Parameters of a network with a low-rank bypass and what it does when run densely, by name.

    `maps` [b h q k] and `tokens` [b n d] of both layers, `tokens` before the first one too; the bypass's `estimate` of
    the second layer's update, and the `logits`.
    """
    model = noisy(planned("worst_bypass", **LOW_RANK))
    graphdef, params = split(model)

    @jax.jit
    def run(params, images):
        model = set_params(graphdef, params)
        tokens, maps = [model.embed(images)], []
        for block in model.blocks:
            moved, attn_map = block(tokens[-1], attend_and_show)
            tokens.append(moved)
            maps.append(attn_map)
        bypass = model.kinds[1].bypass
        estimate = bypass.up(bypass.down(model.blocks[1].norm1(tokens[1])))
        logits = model.classify(model.norm(tokens[-1]))
        return {"maps": maps, "tokens": tokens, "estimate": estimate, "logits": logits}

    found = run(params, random_images())
    shared = {name: x for name, x in params.items() if not name.startswith("kinds/")}
    return {"params": shared, "with_bypass": params} | jax.device_get(found)


def best(scores, count: int = 7) -> np.ndarray:
    """The class token and the `count` best patches, ascending."""
    order = np.argsort(-scores[:, 1:], axis=1)[:, :count] + 1
    return np.concatenate([np.zeros((len(order), 1), int), np.sort(order, axis=1)], axis=1)


def test_class_attention_is_the_first_row_of_the_map_before(dense):
    model = planned("class_attention", dense["params"], head_pool="max")
    out = forward(model, random_images())
    scores = dense["maps"][0][:, :, 0].max(axis=1)
    np.testing.assert_array_equal(out.selected[0], best(scores))
    np.testing.assert_allclose(out.scores[0], scores, atol=1e-5)


def test_the_layer_that_class_attention_reads_is_not_changed_by_it(dense):
    out = forward(planned("class_attention", dense["params"], keep_rate=1.0), random_images())
    assert np.ptp(dense["logits"]) > 0.1
    np.testing.assert_allclose(out.logits, dense["logits"], atol=1e-5)


def test_true_map_is_that_of_the_layer_itself(dense):
    out = forward(planned("true_map", dense["params"], map_chunk=5), random_images())
    previous, true = (attn_map.sum(axis=2).mean(axis=1) for attn_map in dense["maps"])
    np.testing.assert_array_equal(out.selected[0], best(true))
    np.testing.assert_allclose(out.scores[0], true, atol=1e-5)
    assert (best(previous) != best(true)).any()


def test_a_group_reads_the_map_of_its_first_layer(dense):
    plan = ("standard", "true_map", "true_map")
    out = forward(planned("", dense["params"], plan=plan, depth=3), random_images())
    true = dense["maps"][1].sum(axis=2).mean(axis=1)
    assert len(out.selected) == 1
    np.testing.assert_array_equal(out.selected[0], best(true))


@pytest.mark.parametrize("bypass", ["identity", "low_rank"])
def test_worst_bypass_is_the_distance_from_the_dense_update(dense, bypass):
    update = dense["tokens"][2] - dense["tokens"][1]
    model, missed = planned("worst_bypass", dense["params"]), update
    if bypass == "low_rank":
        assert np.abs(dense["estimate"]).max() > 0.05
        model = planned("worst_bypass", dense["with_bypass"], **LOW_RANK)
        missed = update - dense["estimate"]
    out = forward(model, random_images())
    error = np.linalg.norm(missed, axis=-1)
    np.testing.assert_array_equal(out.selected[0], best(error))
    np.testing.assert_allclose(out.scores[0][:, 1:], error[:, 1:], atol=1e-4)


@pytest.mark.parametrize(("fields", "gain"), [({}, 0.15), (LOW_RANK, 0.04)])
def test_predicted_bypass_learns_to_choose_as_the_oracle_does(fields, gain):
    # After the low-rank estimate hardly anything is left that a linear map could know.
    def selected(kind, params):
        model = small_model(depth=2, plan=("standard", kind), keep_rate=0.4, **fields)
        own = split(model)[1] | {k: v for k, v in params.items() if k in split(model)[1]}
        return np.asarray(forward(set_params(split(model)[0], own), held_out).selected[0])[:, 1:]

    images = jax.random.normal(jax.random.key(3), (192, 8, 8, 1))
    held_out = images[128:]
    model = noisy(planned("predicted_bypass", **fields))
    model = set_params(split(model)[0], get_params(model) | {
        k: jnp.zeros_like(v) for k, v in get_params(model).items() if "/miss/" in k
    })  # fmt: skip
    fitted = fit_bypass(model, [images[:64], images[64:128]])
    assert {name.split("/")[2] for name in fitted} == {"miss"} | ({"bypass"} if fields else set())
    params = get_params(model) | fitted
    truth = selected("worst_bypass", params)

    def found(rows):
        pairs = zip(rows, truth, strict=True)
        return np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs])

    chance = truth.shape[1] / 16
    before, after = (selected("predicted_bypass", p) for p in (get_params(model), params))
    assert found(after) > max(found(before), chance) + gain


def test_oracles_cost_what_a_free_prediction_would():
    def macs(kind, **fields):
        return cost.macs(small_model(depth=2, plan=("standard", kind), keep_rate=0.4, **fields))

    free, estimating = macs("random"), macs("random", **LOW_RANK)
    assert macs("true_map") == macs("worst_bypass") == free
    assert macs("worst_bypass", **LOW_RANK) == estimating > free
    assert macs("class_attention") == macs("predicted_bypass") == free + 17 * 16


def test_worst_bypass_refuses_what_it_cannot_know():
    with pytest.raises(ConfigError, match=r"layer 1 in a group.*standard layer before each") as one:
        small_model(plan=("standard", "worst_bypass", "worst_bypass", "standard"))
    with pytest.raises(ConfigError, match="bypass='shared'.*with 'identity' and 'low_rank'") as two:
        small_model(plan="worst_bypass", bypass="shared")
    assert "\n" not in str(one.value) + str(two.value)
