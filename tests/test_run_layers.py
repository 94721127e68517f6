"""Scanning, rematerialisation and the form of gathering change how layers run, not what they compute."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import forward, random_images, small_model, with_noise

from tosa_jax.errors import ConfigError
from tosa_jax.models.encoder import repeated_part
from tosa_jax.models.params import get_params, set_params, split


def loss_and_grads(model, params, images, **call):
    """Output, and the gradient of a loss on all of it, in the parameters."""
    graphdef, own = split(model)

    def loss(p):
        out = set_params(graphdef, p)(images, **call)
        aux = sum(x.sum() for x in out.aux.values())
        return (out.logits**2).sum() + jnp.sin(out.tokens).sum() + aux, out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))({k: params[k] for k in own})
    return out, grads


def noisy(model):
    return with_noise(get_params(model), seed=5)


SHARED = {"keep_rate": 0.5, "drop_path_rate": 0.2}
CALL = {"key": jax.random.key(3), "train": True}


@functools.cache
def plain(plan):
    """Parameters of layers that are run one after the other, and what comes of them."""
    model = small_model(plan=plan, **SHARED)
    params = noisy(model)
    return params, loss_and_grads(model, params, random_images(), **CALL)


WAYS = {
    "scan": {"scan_layers": True},
    "remat": {"remat": "full"},
    "both": {"scan_layers": True, "remat": "dots"},
}


# What layers draw, they draw by their number: dropped paths show that.
@pytest.mark.parametrize(
    ("plan", "way"), [("selective", "scan"), ("selective", "remat"), ("selective_fit", "both")]
)
def test_outputs_and_gradients_are_those_of_plain_layers(plan, way):
    params, expected = plain(plan)
    model = small_model(plan=plan, **SHARED, **WAYS[way])
    found = loss_and_grads(model, params, random_images(), **CALL)
    assert found[0].aux.keys() == expected[0].aux.keys()
    assert len(found[0].selected) == len(expected[0].selected)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("plan", "bypass"), [("selective", ""), ("selective", "shared"), ("redundancy", "shared")]
)
def test_one_hot_gathering_computes_the_same(plan, bypass):
    shared = {"plan": plan, "keep_rate": 0.6, "bypass": bypass, "depth": 2}
    plain = small_model(**shared)
    params, images = noisy(plain), random_images()
    expected = loss_and_grads(plain, params, images)
    found = loss_and_grads(small_model(**shared, gather="one_hot"), params, images)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=2e-5)


def test_the_scanned_program_holds_each_layer_once():
    def matmuls(**fields):
        graphdef, params = split(small_model(keep_rate=0.5, depth=8, **fields))
        lowered = jax.jit(lambda p, x: set_params(graphdef, p)(x).logits).lower(
            params, random_images()
        )
        return lowered.as_text().count("stablehlo.dot_general")

    assert matmuls(scan_layers=True) <= matmuls() / 3


@pytest.mark.compiler
def test_rematerialisation_keeps_less():
    # Scanned: XLA's CPU compiler merges what is computed again with what was, unless a loop is between.
    def temporaries(remat):
        model = small_model(depth=8, image_size=32, remat=remat, scan_layers=True)
        graphdef, params = split(model)
        images = jnp.zeros((8, 32, 32, 1))

        def loss(p):
            return set_params(graphdef, p)(images).tokens.sum()

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("full") < 0.6 * temporaries("none")


@pytest.mark.parametrize(
    ("plan", "period"),
    [("standard", 1), ("selective", 2), (("standard", "selective", "selective") * 2, 3)],
)
def test_the_shortest_part_is_found(plan, period):
    depth = 6
    assert repeated_part(small_model(plan=plan, depth=depth).config) == period


@pytest.mark.parametrize(
    "fields",
    [
        {"plan": "redundancy", "keep_rate": 0.9},
        {"plan": "selective", "keep_rate": (0.5, 0.4)},
        {"plan": ("standard", "standard", "standard", "selective")},
    ],
)
def test_plans_that_do_not_repeat_say_so(fields):
    with pytest.raises(ConfigError, match="repeats with the same token counts"):
        forward(small_model(scan_layers=True, **fields), random_images())


def test_parameters_lie_the_same_way():
    plain, scanned = small_model(keep_rate=0.5), small_model(keep_rate=0.5, scan_layers=True)
    chex.assert_trees_all_equal(get_params(plain), get_params(scanned))
    np.testing.assert_array_equal(
        forward(plain, random_images()).selected[0], forward(scanned, random_images()).selected[0]
    )
