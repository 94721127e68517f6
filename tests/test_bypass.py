"""What becomes of bypassed tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import forward, random_images, small_model, with_noise

from tosa_jax.errors import ConfigError
from tosa_jax.models.bypass_fit import Moments, fit_bypass, solve
from tosa_jax.models.cost import gmacs, macs
from tosa_jax.models.layers import plain_attention
from tosa_jax.models.params import get_params, set_params, split
from tosa_jax.models.plan import layer_specs
from tosa_jax.models.token_state import LayerContext, TokenState
from tosa_jax.ops.reduction import pooled
from tosa_jax.ops.token_matching import with_representatives
from tosa_jax.ops.token_selection import select_tokens


def noisy_params(model, scale=0.1):
    return with_noise(dict(sorted(get_params(model).items())), scale=scale)


def layers(model, params, tokens):
    """Tokens after all layers."""
    graphdef, own = split(model)
    params = {name: params.get(name, x) for name, x in own.items()}
    run = jax.jit(lambda p, x: set_params(graphdef, p).layers(x, key=None, train=False))
    return run(params, tokens)


def pairs_of_tokens(width=16):
    """A class token and eight patches, each of them twice in a row."""
    tokens = jax.random.normal(jax.random.key(1), (3, 9, width))
    return jnp.concatenate([tokens[:, :1], jnp.repeat(tokens[:, 1:], 2, axis=1)], axis=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"plan": "redundancy", "keep_rate": 0.5},
        {"plan": "previous", "keep_rate": 0.5, "bypass": "shared", "redundancy_weight": 1.0},
    ],
    ids=["redundancy", "weighed scores"],
)
def test_where_every_patch_has_a_double_the_dense_tokens_come_out(fields):
    tokens, dense = pairs_of_tokens(), small_model()
    params = noisy_params(dense)
    expected = layers(dense, params, tokens).tokens
    stream = layers(small_model(**fields), params, tokens)
    assert all(s.shape == (3, 9) for s in stream.selected) and stream.selected
    np.testing.assert_allclose(stream.tokens, expected, atol=2e-5)
    for broken in ({"bypass_size_bias": False}, {"bypass_pool": False}):
        other = layers(small_model(**fields | broken), params, tokens).tokens
        assert np.abs(other - expected).max() > 1e-3


def test_a_shared_update_is_that_of_the_most_similar_selected_token():
    model = small_model(plan=("standard", "standard", "standard", "previous"), bypass="shared",
                        bypass_pool=False, keep_rate=0.5)  # fmt: skip
    params = noisy_params(model)
    tokens = jax.random.normal(jax.random.key(2), (2, 17, 16))
    graphdef = split(model)[0]
    plain = small_model(plan=("standard", "standard", "standard", "skip"))
    before = np.asarray(layers(plain, params, tokens).tokens)
    stream = layers(set_params(graphdef, params), params, tokens)
    update = np.asarray(stream.tokens) - before
    unit = before / np.linalg.norm(before, axis=-1, keepdims=True)
    for b in range(2):
        kept = np.asarray(stream.selected[0])[b]
        for i in sorted(set(range(17)) - set(kept)):
            nearest = kept[1:][np.argmax(unit[b, kept[1:]] @ unit[b, i])]
            np.testing.assert_allclose(update[b, i], update[b, nearest], atol=1e-5)


def test_a_group_counts_tokens_that_were_merged_before_it():
    """What enters is the mean of all original tokens that a selected one stands for, and it counts as often."""
    plan = ("standard", "previous", "previous", "standard")
    model = small_model(plan=plan, bypass="shared", keep_rate=0.5)
    tokens = jax.random.normal(jax.random.key(3), (2, 23, 16))
    wanted, scores = jax.random.uniform(jax.random.key(4), (2, 2, 23))
    merged = with_representatives(tokens, select_tokens(wanted, 17, 1), 1)
    earlier = pooled(merged, jnp.ones((2, 23)))
    state = TokenState(tokens).reduced(earlier.merge(tokens), earlier)
    context = LayerContext(plain_attention, key=None, drop_path=None, train=False)
    state = model.kinds[1].apply(model.blocks[1], state._replace(summary=scores[:, :17]), context)
    (group,) = state.open
    stands_for = np.take_along_axis(np.asarray(group.source.slot), np.asarray(merged.slot), axis=1)
    members = np.arange(9)[None, :, None] == stands_for[:, None]
    np.testing.assert_allclose(group.sizes, members.sum(axis=2))
    means = members @ np.asarray(tokens) / members.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(group.entered, means, atol=1e-5)
    assert group.sizes.max() > earlier.sizes.max()


def test_nested_selections_shrink_and_index_the_full_grid():
    model = small_model(plan="redundancy", keep_rate=(0.9, 0.75, 0.6, 0.5))
    out = forward(model, random_images())
    assert [s.shape[1] for s in out.selected] == [16, 13, 11, 9]
    for before, after in zip(out.selected, out.selected[1:], strict=False):
        for row, rest in zip(np.asarray(before), np.asarray(after), strict=True):
            assert set(rest) < set(row) and list(rest) == sorted(rest)
    assert out.tokens.shape == (4, 17, 16)
    for i, scores in enumerate(out.scores):
        assert scores.shape == (4, 17)
        if i:  # what an earlier selection left out, this one has not seen
            seen = np.zeros((4, 17), bool)
            np.put_along_axis(seen, np.asarray(out.selected[i - 1]), True, axis=1)
            assert (np.asarray(scores)[~seen] == 0).all() and (np.asarray(scores)[seen] > 0).all()


def test_low_rank_starts_at_the_identity_and_its_fit_misses_less_of_the_dense_network():
    images = jax.random.normal(jax.random.key(3), (64, 8, 8, 1))
    params = noisy_params(small_model())

    def tokens(**fields):
        model = small_model(plan="previous", keep_rate=0.25, **fields)
        graphdef, own = split(model)
        return set_params(graphdef, own | params | fields_of(own)), graphdef, own

    def fields_of(own):
        return {name: x for name, x in own.items() if name.startswith("kinds/")}

    def final(model, x):
        return np.asarray(forward(model, x).tokens)

    identity, _, _ = tokens(bypass="identity")
    model, graphdef, own = tokens(bypass="low_rank", bypass_rank=8)
    held_out = images[32:]
    np.testing.assert_allclose(final(model, held_out), final(identity, held_out), atol=1e-6)
    fitted = fit_bypass(model, [images[:16], images[16:32]])
    assert set(fitted) == {name for name in own if "/bypass/" in name}
    better = set_params(graphdef, get_params(model) | fitted)
    dense = set_params(split(small_model())[0], params)
    truth = final(dense, held_out)
    missed = [np.square(final(m, held_out) - truth).mean() for m in (model, better)]
    assert missed[1] < 0.6 * missed[0]


def test_the_solution_is_the_best_map_of_its_rank():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 1
    y = x @ rng.normal(size=(6, 2)) @ rng.normal(size=(2, 6)) + rng.normal(size=6)

    def missed(y, rank):
        sums = (400.0, x.sum(0), y.sum(0), x.T @ x, x.T @ y)
        sums = Moments(*(jnp.asarray(v, jnp.float32) for v in sums))
        down, up, bias = solve(sums, rank, ridge=0.0)
        return np.square(y - x @ down @ up - bias).mean()

    assert missed(y, 2) < 1e-6
    noisy = y + rng.normal(size=y.shape)
    centred = noisy - noisy.mean(0), x - x.mean(0)
    full = centred[1] @ np.linalg.lstsq(centred[1], centred[0], rcond=None)[0]
    _, values, axes = np.linalg.svd(full, full_matrices=False)
    best = full @ axes[:1].T @ axes[:1]
    np.testing.assert_allclose(missed(noisy, 1), np.square(centred[0] - best).mean(), rtol=1e-3)


def test_every_estimate_counts_in_multiply_adds():
    def of(**fields):
        plan = ("standard", "standard", "standard", "previous")
        return macs(small_model(plan=plan, keep_rate=0.5, **fields))

    bare, away, stay, d = of(bypass="identity"), 8, 9, 16
    assert of(bypass="low_rank", bypass_rank=3) - bare == away * 2 * d * 3
    assert of(bypass="shared", bypass_pool=False) - bare == away * stay * d
    assert of(bypass="shared") - bare == 2 * away * stay * d
    assert of(redundancy_weight=0.5) - bare == 17 * 17 * d
    dense = small_model()
    block = dense.blocks[0]
    nested = macs(small_model(plan=("standard",) * 3 + ("redundancy",), keep_rate=0.5))
    expected = block.attn_macs(17) + block.mlp_macs(9) + 8 * 9 * 8 + 8 * 9 * d
    assert nested - macs(dense) == expected - block.macs(17)


def test_budgets_fall_linearly_and_keep_their_mean():
    config = small_model(plan="redundancy", keep_rate=0.8, budget="linear", image_size=40).config
    counts = [spec.count - 1 for spec in layer_specs(config)]
    np.testing.assert_allclose(np.asarray(counts) / 400, [0.92, 0.84, 0.76, 0.68], atol=0.003)
    assert gmacs(config) < gmacs(small_model(image_size=40).config)
    rounded = small_model(keep_rate=0.5, count_multiple=8).config
    assert [spec.count for spec in layer_specs(rounded)] == [17, 16, 17, 16]


def test_a_fall_steeper_than_redundancy_can_goes_as_far_down_as_it_can():
    steep = small_model(plan="redundancy", keep_rate=0.3, budget="linear", image_size=40).config
    assert [spec.count - 1 for spec in layer_specs(steep)] == [288, 176, 88, 44]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"plan": "redundancy", "keep_rate": 0.3}, "leaves 9"),
        ({"plan": "redundancy", "bypass": "low_rank"}, "'shared' alone"),
        ({"keep_rate": 0.2, "budget": "linear"}, "mean must be above 0.250"),
        ({"bypass": "sharde"}, "did you mean 'shared'"),
        ({"redundancy_weight": 1.5}, "not in"),
        ({"bypass_rank": 0}, "at least 1"),
        ({"budget": "linaer"}, "did you mean 'linear'"),
        ({"keep_rate": (0.5, 0.5, 0.5)}, "3 values"),
    ],
)
def test_what_cannot_be_is_said(fields, says):
    with pytest.raises(ConfigError, match=says):
        small_model(**{"plan": "selective"} | fields)
