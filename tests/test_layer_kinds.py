"""What holds for ToSA and its controls inside a network."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import forward, random_images, small_model, with_noise

from tosa_jax.errors import ConfigError
from tosa_jax.models.factory import abstract_model
from tosa_jax.models.method import METHODS, Method, layer_kinds
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.params import get_params, set_params, split
from tosa_jax.models.selector import TokenSelector
from tosa_jax.models.token_state import LayerContext, TokenState
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.tasks.classification import Classification
from tosa_jax.tasks.selector_fitting import SelectorFitting

PLANS = {
    "pairs": "selective",
    "shared": ("standard", "selective", "selective", "standard"),
    "previous": "previous",
    "random": "random",
    "ends selective": ("standard", "standard", "standard", "selective"),
}
TASK = Classification(num_classes=10, mean=(0.0,), std=(1.0,))


def noisy(model):
    """The model with every parameter moved, so that nothing is zero or one by initialisation."""
    graphdef, params = split(model)
    return set_params(graphdef, with_noise(params))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_keep_rate_one_gives_the_dense_logits(plan):
    images, key = random_images(), jax.random.key(0)
    dense, model = small_model(), small_model(plan=plan, keep_rate=1.0)
    shared = get_params(noisy(dense))
    model = set_params(split(model)[0], get_params(model) | shared)
    expected = forward(set_params(split(dense)[0], shared), images).logits
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(forward(model, images, key).logits, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["selective", "random", "previous"])
def test_bypassed_tokens_are_bit_identical_across_a_selective_layer(kind):
    model = small_model(plan=kind, keep_rate=0.5)
    tokens = jax.random.normal(jax.random.key(1), (3, 17, 16))
    layer, block = model.kinds[1], model.blocks[1]
    scores = jax.random.normal(jax.random.key(2), (3, 17))
    call = LayerContext(lambda q, k, v: (v, None), jax.random.key(0), 0.0, False)
    stream = layer.apply(block, TokenState(tokens, summary=scores), call)
    selected = np.zeros((3, 17), bool)
    np.put_along_axis(selected, np.asarray(stream.selected[0]), True, axis=1)
    assert selected.sum(axis=1).tolist() == [9, 9, 9]
    np.testing.assert_array_equal(stream.tokens[~selected], tokens[~selected])
    assert (np.asarray(stream.tokens != tokens).any(axis=2) == selected).all()


def test_an_untrained_selector_selects_what_previous_selects():
    images = random_images()
    params = get_params(noisy(small_model()))
    chosen = {}
    for kind in ("selective", "previous"):
        model = small_model(plan=kind, keep_rate=0.4)
        model = set_params(split(model)[0], get_params(model) | params)
        chosen[kind] = forward(model, images).selected
    assert len(chosen["previous"]) == 2
    chex.assert_trees_all_equal(chosen["selective"], chosen["previous"])


def test_permuting_patches_with_their_positions_permutes_the_selection():
    model = noisy(small_model(keep_rate=0.4))
    tokens = model.embed(random_images())
    order = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(16)])
    graphdef, params = split(model)
    layers = jax.jit(lambda p, x: set_params(graphdef, p).layers(x, key=None, train=False))
    straight, permuted = layers(params, tokens), layers(params, tokens[:, order])
    for before, after in zip(straight.selected, permuted.selected, strict=True):
        np.testing.assert_array_equal(np.sort(order[np.asarray(after)]), before)
    np.testing.assert_allclose(permuted.tokens, straight.tokens[:, order], atol=1e-5)


def test_task_loss_leaves_selectors_alone_and_selector_loss_leaves_the_rest_alone():
    targets = jax.nn.one_hot(jnp.arange(4), 10)
    images = random_images()

    def grads(plan, task):
        batch = {"target": targets}
        graphdef, params = split(noisy(small_model(plan=plan, keep_rate=0.5)))
        loss = jax.grad(lambda p: task.loss(set_params(graphdef, p)(images), batch).sum())
        return jax.jit(loss)(params)

    is_selector = re.compile(r"/selector/").search
    for plan, task, wants_selector in (
        ("selective", TASK, False),
        ("selective_fit", SelectorFitting.of_task(TASK), True),
    ):
        moved = {name: bool(jnp.abs(g).max() > 0) for name, g in grads(plan, task).items()}
        assert {name for name in moved if is_selector(name)}
        for name, has_grad in moved.items():
            unreached = not wants_selector and name.endswith("qkv/bias")
            if bool(is_selector(name)) == wants_selector and not unreached:
                # A bias of the last convolution shifts a whole row of logits: softmax does not see it.
                assert has_grad or name.endswith("conv2/bias"), name
            elif bool(is_selector(name)) != wants_selector:
                assert not has_grad, name


def first_layers(model, images, count):
    """The logits [b h q k] of the first layers, as in a textbook."""
    found = []

    def record(query, key, value):
        logits = jnp.einsum("bqhc,bkhc->bhqk", query, key) / query.shape[-1] ** 0.5
        found.append(logits)
        return jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(logits), value), None

    tokens = model.embed(images)
    for block in model.blocks[:count]:
        tokens, _ = block(tokens, record)
    return found


@pytest.mark.parametrize("stride", [1, 2])
def test_fit_layers_report_the_divergence_and_recall_of_whole_maps(stride):
    """With a stride, the recall of the scores that selection would use."""
    fields = {"keep_rate": 0.5, "selector_query_stride": stride}
    model = noisy(small_model(plan="selective_fit", **fields))
    chunked = VisionTransformer(dataclasses.replace(model.config, map_chunk=5), rngs=nnx.Rngs(0))
    chunked = set_params(split(chunked)[0], get_params(model))
    images = random_images()
    out = forward(model, images)
    chex.assert_trees_all_close(out.aux, forward(chunked, images).aux, atol=1e-5)

    logits = first_layers(model, images, 2)
    maps = [jax.nn.softmax(x) for x in logits]
    found = model.kinds[1].selector(logits[0])
    divergence = (maps[1] * (jnp.log(maps[1]) - found)).sum(-1).mean((1, 2))
    np.testing.assert_allclose(out.aux["selector/kl/1"], divergence, atol=1e-6)

    def best(scores):
        return [set(np.argsort(-row)[:8]) for row in np.asarray(scores)[:, 1:]]

    truth = best(maps[1].sum(2).mean(1))
    for name, scores in (("selector", jnp.exp(found)[:, :, ::stride]), ("previous", maps[0])):
        share = [len(a & b) / 8 for a, b in zip(truth, best(scores.sum(2).mean(1)), strict=True)]
        np.testing.assert_allclose(out.aux[f"{name}/recall/1"], share, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"map_chunk": 5}, {"kernel_size": 3}])
def test_scores_are_sums_over_the_rows_that_the_selector_reads(fields):
    """Only they change: attention is that of all rows."""
    images = random_images()
    model = noisy(small_model(keep_rate=0.5, selector_query_stride=4, **fields))
    graphdef, params = split(model)
    state = jax.jit(
        lambda p, x: (m := set_params(graphdef, p)).layers(m.embed(x), key=None, train=False)
    )(params, images)
    (logits,) = first_layers(model, images, 1)
    predicted = jnp.exp(model.kinds[1].selector(logits))
    wanted = predicted[:, :, ::4].sum(axis=2).mean(axis=1)
    np.testing.assert_allclose(state.scores[0], wanted, atol=1e-5)
    every = small_model(keep_rate=1.0, selector_query_stride=4, **fields)
    dense = set_params(split(small_model())[0], {k: params[k] for k in get_params(small_model())})
    every = set_params(split(every)[0], params)
    np.testing.assert_allclose(
        forward(every, images).logits, forward(dense, images).logits, atol=1e-5
    )


def test_a_shared_selection_is_made_once_and_one_kind_differs_from_another():
    images = random_images()
    shared = small_model(plan=PLANS["shared"], keep_rate=0.5)
    assert [s.shape for s in forward(shared, images).selected] == [(4, 9)]
    assert "kinds/1/selector/conv1/kernel" in get_params(shared)
    assert "kinds/2/selector/conv1/kernel" not in get_params(shared)


def test_random_selection_is_fresh_for_each_key_and_skip_removes_layers():
    images = random_images()
    model = small_model(plan="random", keep_rate=0.5)
    one, two = (forward(model, images, jax.random.key(i)).selected[0] for i in range(2))
    assert (one != two).any()
    skipping = small_model(plan="skip")
    dense = small_model()
    tokens = dense.embed(images)
    for block in (dense.blocks[0], dense.blocks[2]):
        tokens, _ = block(tokens)
    np.testing.assert_allclose(forward(skipping, images).tokens, dense.norm(tokens), atol=1e-6)


def test_a_new_kind_is_one_class_and_one_entry(monkeypatch):
    class Halve(Standard):
        """Adds half of each update."""

        def apply(self, block, stream, call):
            tokens, _ = call.run(block, stream.tokens)
            return stream._replace(tokens=(stream.tokens + tokens) / 2)

    monkeypatch.setitem(METHODS, "halve", Method(name="halve", kind=Halve))
    images = random_images()
    model = small_model(plan=("standard", "halve", "standard", "halve"))
    dense = small_model()
    tokens = dense.embed(images)
    for i, block in enumerate(dense.blocks):
        new, _ = block(tokens)
        tokens = (tokens + new) / 2 if i % 2 else new
    np.testing.assert_allclose(forward(model, images).tokens, dense.norm(tokens), atol=1e-6)


@pytest.mark.parametrize("kind", sorted(layer_kinds().keys() - {"psvit_share"}))
def test_no_map_leaves_a_layer(kind, monkeypatch):
    """Whatever flows between layers is linear in the number of tokens."""
    flowing = []

    def spy_on(cls):
        apply = cls.apply

        def spy(self, block, stream, call):
            out = apply(self, block, stream, call)
            flowing.extend(jax.tree.leaves(out))
            return out

        monkeypatch.setattr(cls, "apply", spy)

    for cls in {layer_kinds()["standard"], layer_kinds()[kind]}:
        spy_on(cls)
    plan = kind if kind != "standard" else None
    model = abstract_model(small_model(plan=plan, keep_rate=0.5).config)
    n = model.config.num_tokens
    jax.eval_shape(lambda m: m(random_images(), key=jax.random.key(0)), model)
    assert len(flowing) >= 4
    assert not [x.shape for x in flowing if x.shape.count(n) > 1]


def test_the_training_step_has_no_float_scatter():
    graphdef, params = split(small_model(keep_rate=0.5))

    def loss(params):
        return set_params(graphdef, params)(random_images()).logits.sum()

    # Before compiling: XLA's CPU compiler may write a scatter as a loop.
    text = jax.jit(jax.value_and_grad(loss)).lower(params).as_text()
    assert "stablehlo.gather" in text
    scatters = re.findall(r'"stablehlo\.scatter".*?\}\) : \((.*?)\) ->', text, re.DOTALL)
    assert not [types for types in scatters if re.search(r"x?b?f\d+>", types)]


def test_random_needs_a_key():
    with pytest.raises(ConfigError, match="key"):
        small_model(plan="random", keep_rate=0.5)(random_images())


def test_no_gradient_reaches_the_logits_that_a_selector_reads():
    selector = TokenSelector(small_model().config)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 3)), jnp.float32)
    grad = jax.jit(jax.grad(lambda x: (selector(x) ** 2).sum()))(logits)
    np.testing.assert_array_equal(grad, 0)
