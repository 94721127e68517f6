"""Labels that travel with tokens (TL-Align), against their definition, one image and one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import layers_of, merged, tome_groups
from small import random_images, small_model
from test_layer_kinds import noisy

from tosa_jax.errors import ConfigError
from tosa_jax.models.method import METHODS, plan_named
from tosa_jax.models.params import set_params, split
from tosa_jax.tasks.classification import Classification
from tosa_jax.tasks.losses import soft_cross_entropy
from tosa_jax.tasks.mixing import MixingConfig, mix

CUTMIX = {"cutmix": 1.0, "mixup": 0.5}
TASK = Classification(
    num_classes=10, mean=(0.3,), std=(0.4,), label_smoothing=0.1, patch_size=2,
    mixing=MixingConfig(**CUTMIX, align_labels=True),
)  # fmt: skip
BATCH = {
    "image": jax.random.randint(jax.random.key(4), (4, 8, 8, 1), 0, 256).astype(jnp.uint8),
    "label": jnp.array([3, 1, 4, 5]),
}
# A draw of cutmix whose box cuts through patches.
KEY = next(
    key
    for key in jax.random.split(jax.random.key(0), 20)
    if len(np.unique(TASK.training_batch(BATCH, key)["patch_share"][0])) > 2
)


def sharp(model):
    """A network whose attention is far from uniform, so that it matters whose label goes where."""
    graphdef, params = split(noisy(model))
    return set_params(graphdef, {k: x * (12 if "qkv/k" in k else 1) for k, x in params.items()})


def labelled(model, images, shares, **fields):
    """The output of a model for images with patch labels, compiled."""
    graphdef, params = split(model)
    run = jax.jit(lambda p, x, y: set_params(graphdef, p)(x, patch_labels=y, **fields))
    return run(params, images, shares)


def tokens_of(model, images):
    return np.asarray(jax.jit(lambda m, x: m.embed(x))(model, images), np.float64)


def mixed(labels, attn_map):
    """The published step: attention without its heads, averaged with what was there."""
    return (attn_map.mean(axis=0) @ labels + labels) / 2


def dense(layers, x, labels, selected):
    for layer in layers:
        _, attn_map, _, _ = layer.attention(x)
        x, labels = layer(x), mixed(labels, attn_map)
    return labels[0]


def tosa(layers, x, labels, selected):
    selected = iter(selected)
    for number, layer in enumerate(layers):
        rows = next(selected) if number % 2 else np.arange(len(x))
        _, attn_map, _, _ = layer.attention(x[rows])
        x[rows], labels[rows] = layer(x[rows]), mixed(labels[rows], attn_map)
    return labels[0]


def tome(layers, x, labels, selected):
    sizes = np.ones(len(x))
    for layer in layers:
        x, attn_map, keys, _ = layer.attention(x, sizes)
        groups = tome_groups(keys.mean(axis=0), 3)
        labels, _ = merged(mixed(labels, attn_map), sizes, groups)
        x, sizes = merged(x, sizes, groups)
        x = layer.mlp(x)
    return labels[0]


@pytest.mark.parametrize(
    ("fields", "statement"),
    [({}, dense), ({"plan": "selective", "keep_rate": 0.5}, tosa),
     ({"plan": ("tome",) * 4, "removed": (3,)}, tome)],
    ids=["dense", "tosa", "tome"],
)  # fmt: skip
def test_targets_are_the_published_ones(fields, statement):
    """Whole distributions over classes travel in the statement; the package sends one number a token."""
    model = sharp(small_model(**fields))
    batch = TASK.training_batch(BATCH, KEY)
    out = labelled(model, batch["image"], batch["patch_share"])
    share = np.asarray(out.aux["label"])[:, None]
    found = batch["target"] * share + batch["partner"] * (1 - share)
    smooth = np.eye(10)[np.asarray(BATCH["label"])] * 0.9 + 0.01
    moved, tokens, layers = [], tokens_of(model, batch["image"]), layers_of(model)
    for i in range(4):
        own = np.asarray(batch["patch_share"], np.float64)[i]
        own = np.concatenate([[own.mean()], own])[:, None]
        labels = own * smooth[i] + (1 - own) * smooth[::-1][i]
        chosen = [np.asarray(x)[i] for x in out.selected]
        want = statement(layers, tokens[i].copy(), labels.copy(), chosen)
        np.testing.assert_allclose(found[i], want, atol=1e-5)
        moved.append(np.abs(want - labels[0]).max())
    assert max(moved) > 5e-3  # it is not what mixing alone gives


KINDS = [m for m in METHODS.values() if not m.oracle and m.name != "predicted_bypass"]


@pytest.mark.parametrize("method", KINDS, ids=lambda method: method.name)
def test_labels_of_every_method_are_shares(method):
    """A label that all patches have is every token's in every layer; others stay between them."""
    depth = 2 if method.plan != "psvit_share" else 4
    plan = plan_named(method.plan, depth)
    if method.name == "psvit_share":
        plan = ("psvit", "psvit_share") * 2
    fields = {"keep_rate": 0.6} if method.has_budget else {}
    model = noisy(small_model(plan=plan, depth=depth, **fields))
    images, key = random_images(2), jax.random.key(0)
    shares = jnp.stack([jnp.full(16, 0.3), jnp.linspace(0.2, 0.9, 16)])
    fields = {"key": key, "train": method.name in ("dynamicvit", "as_vit")}
    out = labelled(model, images, shares, tokens=False, **fields)
    same, other = np.asarray(out.aux["label"])
    assert abs(same - 0.3) < 1e-5 and 0.2 < other < 0.9
    # Labels change nothing of what is predicted.
    graphdef, params = split(model)
    plain = jax.jit(lambda p, x: set_params(graphdef, p)(x, tokens=False, **fields).logits)
    np.testing.assert_allclose(out.logits, plain(params, images), atol=1e-5)


def test_a_head_that_reads_the_mean_gets_the_mean_of_the_labels_that_are_left():
    model = noisy(small_model(plan=("tome",) * 2, depth=2, removed=(5,), global_pool="avg"))
    shares = jax.random.uniform(jax.random.key(2), (1, 16))
    images = random_images(1)
    found = labelled(model, images, shares).aux["label"]
    x, labels = tokens_of(model, images)[0], np.asarray(shares, np.float64)[0]
    labels, sizes = np.concatenate([[labels.mean()], labels])[:, None], np.ones(17)
    for layer in layers_of(model):
        x, attn_map, keys, _ = layer.attention(x, sizes)
        groups = tome_groups(keys.mean(axis=0), 5)
        labels, _ = merged(mixed(labels, attn_map), sizes, groups)
        x, sizes = merged(x, sizes, groups)
        x = layer.mlp(x)
    want = (labels[1:, 0] * sizes[1:]).sum() / sizes[1:].sum()
    np.testing.assert_allclose(found, [want], atol=1e-5)


def test_the_loss_is_that_of_the_aligned_target_whose_gradient_stops():
    model = noisy(small_model(plan="selective", keep_rate=0.5))
    graphdef, params = split(model)
    batch = TASK.training_batch(BATCH, KEY)
    keys = jax.random.split(jax.random.key(1), 4)

    def loss(params, batch, keys):
        forward = set_params(graphdef, params)
        return TASK.training_loss(forward, batch, keys, None, {}).values

    def fixed(params, target):
        forward = set_params(graphdef, params)
        return soft_cross_entropy(forward(batch["image"], key=keys).logits, target)

    values, grads = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, keys).mean()))(params)
    share = labelled(model, batch["image"], batch["patch_share"]).aux["label"][:, None]
    target = batch["target"] * share + batch["partner"] * (1 - share)
    want, want_grads = jax.jit(jax.value_and_grad(lambda p: fixed(p, target).mean()))(params)
    np.testing.assert_allclose(values, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, want_grads)
    # Some rows of a batch keep their partners, which were taken from the whole batch.
    part = jax.jit(loss)(params, *jax.tree.map(lambda x: x[1::2], (batch, keys)))
    np.testing.assert_allclose(part, jax.jit(loss)(params, batch, keys)[1::2], rtol=1e-5)


def test_pixels_are_mixed_as_without_alignment():
    plain = Classification(
        num_classes=10, mean=(0.3,), std=(0.4,), label_smoothing=0.1, mixing=MixingConfig(**CUTMIX)
    )
    before, after = plain.training_batch(BATCH, KEY), TASK.training_batch(BATCH, KEY)
    assert set(before) == {"image", "target"}
    np.testing.assert_array_equal(before["image"], after["image"])
    targets = np.eye(10)[np.asarray(BATCH["label"])] * 0.9 + 0.01
    again = mix(plain.mixing, jax.random.split(KEY)[1], plain.inputs(BATCH["image"]), jnp.asarray(targets))  # fmt: skip
    np.testing.assert_allclose(before["target"], again[1], atol=1e-6)
    share = np.asarray(after["patch_share"]).mean(axis=1, keepdims=True)
    want = after["target"] * share + after["partner"] * (1 - share)
    np.testing.assert_allclose(before["target"], want, atol=1e-6)


def test_what_cannot_be_aligned_is_one_line():
    with pytest.raises(ConfigError, match="align_labels=True needs cutmix above 0"):
        MixingConfig(mixup=0.8, align_labels=True)
    model = small_model(global_pool="map")
    with pytest.raises(ConfigError, match="global_pool='map'"):
        model(random_images(), patch_labels=jnp.ones((4, 16)))
