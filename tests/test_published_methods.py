"""Each method against an independent statement of its published algorithm, and at its published counts and cost."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from small import random_images, small_model
from test_layer_kinds import noisy

import tosa_jax
from tosa_jax import bench
from tosa_jax.errors import ConfigError
from tosa_jax.inference.loading import from_weights
from tosa_jax.models.cost import gmacs
from tosa_jax.models.methods.diffrate import read_schedule
from tosa_jax.models.params import get_params, set_params, split
from tosa_jax.models.plan import layer_specs
from tosa_jax.models.token_state import TokenState
from tosa_jax.models.variants import variant_config
from tosa_jax.models.vit import Output

# Of OpenGVLab/DiffRate, compression_rate.json, "ViT-S-DeiT".
SCHEDULES = {
    "2.3": ([197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3],
            [197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3]),
    "2.9": ([197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3],
            [197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3]),
}  # fmt: skip
DIFFRATE = {
    cost: {"plan": "diffrate", "pruned_to": tuple(pruned), "merged_to": tuple(merged)}
    for cost, (pruned, merged) in SCHEDULES.items()
}


MERGES = []  # whether PPT merged, for each layer and image of the statement

CASES = {
    "tome": (
        {"plan": ("tome", "tome"), "removed": (3, 4)},
        functools.partial(published.tome, removed=(3, 4)),
    ),
    "evit": (
        {"plan": ("evit", "evit"), "keep_rate": 0.6},
        functools.partial(published.evit, places=(0, 1), rate=0.6),
    ),
    "diffrate": (
        {"plan": ("diffrate", "diffrate"), "pruned_to": (14, 8), "merged_to": (10, 6)},
        functools.partial(published.diffrate, pruned_to=(14, 8), merged_to=(10, 6)),
    ),
    "ppt": (
        {"plan": ("ppt", "ppt"), "removed": (4, 3), "ppt_threshold": 6e-4},
        functools.partial(published.ppt, removed=(4, 3), threshold=6e-4, seen=MERGES),
    ),
    "mctf": (
        {"plan": ("mctf", "mctf"), "removed": (4, 3)},
        functools.partial(published.mctf, removed=(4, 3)),
    ),
    "mctf, previous map": (
        {"plan": ("standard", "mctf"), "removed": (5,), "mctf_information": "previous"},
        functools.partial(published.mctf, removed=(0, 5), information="previous"),
    ),
    "mctf, class token's row": (
        {"plan": ("standard", "mctf"), "removed": (5,), "mctf_information": "class"},
        functools.partial(published.mctf, removed=(0, 5), information="class"),
    ),
    "ats": (
        {"plan": ("ats", "ats"), "keep_rate": 0.6},
        functools.partial(published.ats, rate=0.6),
    ),
    "dynamicvit": (
        {"plan": ("dynamicvit", "dynamicvit"), "keep_rate": 0.6},
        functools.partial(published.dynamicvit, rate=0.6),
    ),
    "as_vit": (
        {"plan": ("standard", "as_vit"), "keep_rate": 0.6},
        functools.partial(published.as_vit, rate=0.6),
    ),
    "expedit": (
        {"plan": ("standard", "expedit"), "keep_rate": 0.55, "cluster_window": 3,
         "cluster_neighbours": 4, "cluster_temperature": 0.1, "cluster_rounds": 3},
        functools.partial(published.expedit, grid=(4, 4), pooled=(3, 3), rounds=3, window=3,
                          neighbours=4, temperature=0.1),
    ),
    "ailurus": (
        {"plan": ("standard", "ailurus"), "keep_rate": 0.5},
        functools.partial(published.ailurus, columns=4, rate=0.5, space=1.0, neighbours=5),
    ),
    "psvit": (
        {"plan": ("psvit", "psvit_share"), "keep_rate": 0.3},
        functools.partial(published.psvit, grids=(((4, 4), (2, 2)), None)),
    ),
    "token_learner": (
        {"plan": ("standard", "token_learner"), "keep_rate": 0.25}, published.token_learner
    ),
    "token_fuser": (
        {"plan": ("standard", "token_fuser"), "keep_rate": 0.25},
        functools.partial(published.token_learner, fuse=True),
    ),
}  # fmt: skip
"""Fields of a network of two layers, and the function that states what it computes."""


@functools.cache
def network(**fields):
    """A network of two layers on 17 tokens with parameters that are not those of the start."""
    return noisy(small_model(depth=2, **fields))


def through_layers(graphdef, params, tokens):
    """The tokens that are left after the layers, and all of them back in their places."""
    model = set_params(graphdef, params)
    state = model.layers(tokens, key=jax.random.key(1), train=False)
    return state.tokens, model.kinds[-1].restore(state).tokens


run = jax.jit(through_layers, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def gradients(graphdef, params, tokens):
    """Those of a sum over all tokens that are left."""

    def loss(params):
        left, _ = through_layers(graphdef, params, tokens)
        return jnp.tanh(left @ jnp.cos(jnp.arange(16.0))).sum()

    return jax.grad(loss)(params)


def tokens_of(dtype=jnp.float32):
    """Tokens of four images, one on each of four devices."""
    tokens = jax.random.normal(jax.random.key(1), (4, 17, 16)).astype(dtype)
    mesh = Mesh(np.array(jax.devices()[:4]), "data")
    return jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_was_published(name):
    """On a mesh of four devices, an image each."""
    fields, statement = CASES[name]
    model, tokens = network(**fields), tokens_of()
    layers = published.layers_of(model)
    few, grid = jax.device_get(run(*split(model), tokens))
    for image, x in enumerate(np.asarray(tokens, np.float64)):
        left, owner = statement(layers, x)
        assert len(left) == few.shape[1] == layer_specs(model.config)[-1].count_out
        np.testing.assert_allclose(few[image, 0], left[0], atol=1e-5)
        whole = left[owner] if owner.ndim == 1 else owner
        np.testing.assert_allclose(grid[image], whole, atol=1e-5)
    if name == "ppt":
        assert 0 < sum(MERGES) < len(MERGES)


@pytest.mark.parametrize("name", ["tome", "evit", "mctf", "ats", "token_fuser"])
def test_it_trains(name):
    """One of each way in which tokens become fewer; `test_a_learned_choice_masks_in_training` has two more."""
    model = network(**CASES[name][0])
    grads = jax.device_get(gradients(*split(model), np.asarray(tokens_of())))
    assert all(np.isfinite(g).all() for g in grads.values())
    unmoved = [path for path, g in grads.items() if not np.abs(g).max()]
    assert not [path for path in unmoved if path.startswith(("blocks/", "kinds/"))]


def test_an_untrained_selector_tells_mctf_what_the_map_before_does():
    model = network(plan=("standard", "mctf_predicted"), removed=(5,))
    fresh = get_params(small_model(depth=2, plan=("standard", "mctf_predicted"), removed=(5,)))
    graphdef, params = split(model)
    params = params | {path: x for path, x in fresh.items() if path.startswith("kinds/")}
    tokens = tokens_of()
    _, grid = jax.device_get(run(graphdef, params, tokens))
    statement, layers = CASES["mctf, previous map"][1], published.layers_of(model)
    for image, x in enumerate(np.asarray(tokens, np.float64)):
        left, owner = statement(layers, x)
        np.testing.assert_allclose(grid[image], left[owner], atol=1e-5)
    assert [path for path in params if "selector" in path]


def test_tokens_that_mctf_merged_get_updates_where_that_is_wanted():
    """Not copies: what was not updated is as it was, and what became of a merged token is added to its members."""
    model = network(plan=("mctf", "standard"), removed=(5,), mctf_restore="update")
    copying = network(plan=("mctf", "standard"), removed=(5,))
    tokens = np.asarray(tokens_of())

    @jax.jit
    def merged(tokens):
        attended = jnp.ones(tokens.shape[:2])
        state, groups = model.kinds[0].fused(TokenState(tokens), attended)
        other, _ = copying.kinds[0].fused(TokenState(tokens), attended)
        moved = jnp.arange(state.tokens.shape[1], dtype=jnp.float32)[None, :, None]
        later = state._replace(tokens=state.tokens + moved)
        left = state.tokens, other.tokens
        back = (x.restored_grid().tokens for x in (state, other, later))
        return left, tuple(back), groups.source.slot

    left, (same, copied, later), slot = jax.device_get(merged(tokens))
    np.testing.assert_array_equal(*left)
    np.testing.assert_allclose(same, tokens, atol=1e-6)
    assert np.abs(copied - tokens).max() > 0.1
    np.testing.assert_allclose(later, tokens + slot[:, :, None], atol=1e-5)


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_a_head_that_reads_all_tokens_counts_merged_ones_by_size(pool):
    """As if each of the original tokens had a copy: ToMe's rule for a mean."""
    graphdef, params = split(network(plan="tome", removed=(4,), global_pool=pool))

    @jax.jit
    def both(params, images):
        model = set_params(graphdef, params)
        state = model.layers(model.embed(images), key=None, train=False)
        grid = model.kinds[-1].restore(state).tokens
        grid = grid if pool == "avg" else model.norm(grid)
        logits = model(images).logits, model.classify(grid), model.classify(grid[:, :12])
        return logits, (model.features(images), model.pool(grid), model.pool(grid[:, :12]))

    for found, wanted, other in jax.device_get(both(params, random_images())):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert np.abs(other - wanted).max() > 1e-3


@pytest.mark.parametrize("name", ["tome", "evit", "ppt", "mctf", "expedit"])
def test_in_bfloat16_it_is_finite_and_near(name):
    fields, _ = CASES[name]
    model, tokens = network(**fields), tokens_of()
    graphdef, params = split(model)
    narrow = small_model(depth=2, **fields, dtype="bfloat16")
    few, grid = run(split(narrow)[0], params, tokens_of(jnp.bfloat16))
    wide, _ = run(graphdef, params, tokens)
    few, grid, wide = (np.asarray(x).astype(np.float32) for x in (few, grid, wide))
    assert np.isfinite(few).all() and np.isfinite(grid).all()
    # Near ties are decided otherwise: the class token says how near the whole is.
    error = np.linalg.norm(few[:, 0] - wide[:, 0]) / np.linalg.norm(wide[:, 0])
    assert error < 0.05


@pytest.mark.parametrize("name", [name for name in CASES if name != "psvit"])
def test_with_nothing_removed_it_is_the_dense_network(name):
    """The same program, that is; but PSViT, whose layers share their maps all the same."""
    plan = CASES[name][0]["plan"]
    model, dense = (small_model(depth=2, **x) for x in ({"plan": plan, "keep_rate": 1.0}, {}))
    assert {spec.count_out for spec in layer_specs(model.config)} == {17}
    tokens = np.zeros((4, 17, 16), np.float32)
    programs = []
    for one in (model, dense):
        graphdef, params = split(one)
        of_blocks = {path: x for path, x in params.items() if path in get_params(dense)}
        assert of_blocks.keys() == params.keys()
        programs.append(
            str(jax.make_jaxpr(functools.partial(through_layers, graphdef))(params, tokens))
        )
    assert programs[0] == programs[1]


def test_the_predictor_of_dynamicvit_is_the_published_one():
    """The choice alone would hardly show it: a mean that all patches share rarely changes their order."""
    model = network(**CASES["dynamicvit"][0])
    graphdef, params = split(model)
    found = jax.jit(lambda p, x: set_params(graphdef, p).kinds[0].scores(TokenState(x)))
    tokens = np.asarray(tokens_of())
    scores = np.asarray(found(params, tokens))
    for image, x in enumerate(tokens.astype(np.float64)):
        wanted = published.predicted(published.layers_of(model)[0], x)
        np.testing.assert_allclose(scores[image, 1:], wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["dynamicvit", "as_vit"])
def test_a_learned_choice_masks_in_training(name):
    """What is masked is as good as gone, and both the loss of the shares and the output train the choice."""
    model, tokens = network(plan=("standard", name), keep_rate=0.6), tokens_of()
    graphdef, params = split(model)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def trained(params, of_output):
        model = set_params(graphdef, params)
        state = model.layers(tokens, key=jax.random.key(3), train=True)
        losses = Output({}, None, (), state.aux).layer_losses
        read = jnp.tanh(state.tokens[:, 0] @ jnp.cos(jnp.arange(16.0)))
        loss = of_output * read.sum() + (1 - of_output) * losses.mean()
        return loss, (state.tokens, state.policy, losses)

    layers = published.layers_of(model)
    if name == "as_vit":
        # Half of the first image's patches are above the threshold, one of them hardly.
        first = np.asarray(tokens[0], np.float64)
        threshold = np.sort(published.head_weighted_row(layers[0], first))[8] - 1e-4
        params = params | {"kinds/1/threshold": jnp.asarray(threshold, jnp.float32)}
    parts = jax.device_get([trained(params, of_output) for of_output in (0.0, 1.0)])
    grads, (left_tokens, policy, losses) = [grad for grad, _ in parts], parts[0][1]
    assert set(policy.ravel()) == {0.0, 1.0} and (policy[:, 0] == 1).all()
    share = policy[:, 1:].mean()
    missed = abs(share - (9 if name == "dynamicvit" else 10) / 16)  # .6 of them, rounded down or up
    np.testing.assert_allclose(losses, 2 * missed ** (2 if name == "dynamicvit" else 1), atol=1e-6)
    for image, x in enumerate(np.asarray(tokens, np.float64)):
        left = layers[1](layers[0](x)[policy[image] > 0])
        np.testing.assert_allclose(left_tokens[image, 0], left[0], atol=2e-5)
    for grad in grads:
        learned = {path: g for path, g in grad.items() if path.startswith("kinds/1/")}
        assert learned and all(np.isfinite(g).all() and np.abs(g).max() for g in learned.values())


@pytest.mark.parametrize("plan", [("dynamicvit", "dynamicvit"), ("standard", "as_vit")])
def test_the_best_patch_stays_where_all_would_go(plan, monkeypatch):
    """With few patches a choice that is drawn soon keeps none; the mean of none is no number."""
    model = network(plan=plan, keep_rate=0.9)
    kind = type(model.kinds[1])
    monkeypatch.setattr(kind, "decide", lambda self, scores, context: scores * 0.0)
    graphdef, params = split(model)

    @jax.jit
    def trained(params):
        def loss(params):
            model = set_params(graphdef, params)
            state = model.layers(tokens_of(), key=jax.random.key(3), train=True)
            return jnp.square(state.tokens[:, 0]).sum(), state.policy

        return jax.grad(loss, has_aux=True)(params)

    grads, policy = jax.device_get(trained(params))
    assert set(policy.ravel()) == {0.0, 1.0} and (policy.sum(axis=1) == 2).all()
    assert all(np.isfinite(g).all() for g in grads.values())


def deit(size="small", **fields):
    return variant_config(f"deit_{size}_patch16_224", **fields)


@pytest.mark.parametrize(
    ("fields", "counts", "published"),
    [
        ({"plan": "tome", "removed": (13,)}, [197 - 13 * i for i in range(1, 13)], 2.70),
        ({"plan": "evit", "keep_rate": 0.7}, [197] * 3 + [140] * 3 + [100] * 3 + [72] * 3, 3.0),
        ({"plan": "evit", "keep_rate": 0.5}, [197] * 3 + [100] * 3 + [52] * 3 + [28] * 3, 2.3),
        ({"plan": "ppt", "removed": (50,)}, [197] * 3 + [147] * 3 + [97] * 3 + [49] * 3, 2.94),
        ({"plan": "mctf", "removed": (16,)}, [197, *(197 - 16 * i for i in range(1, 12))], 2.60),
        # 2.88 for the layers, as published, and .10 for the predictors.
        (
            {"plan": "dynamicvit", "keep_rate": 0.7},
            [197] * 3 + [138] * 3 + [97] * 3 + [68] * 3,
            2.98,
        ),
        (DIFFRATE["2.9"], SCHEDULES["2.9"][1], 2.9),
        (DIFFRATE["2.3"], SCHEDULES["2.3"][1], 2.3),
    ],
)
def test_counts_and_cost_are_the_published_ones(fields, counts, published):
    config = deit(**fields)
    assert [spec.count_out for spec in layer_specs(config)] == counts
    assert gmacs(config) == pytest.approx(published, abs=0.05)


def test_a_schedule_is_read_from_a_file(tmp_path):
    path = tmp_path / "rates.json"
    of_small = {
        cost: {"prune_kept_num": str(pruned), "merge_kept_num": str(merged)}
        for cost, (pruned, merged) in SCHEDULES.items()
    }
    path.write_text(json.dumps({"ViT-S-DeiT": of_small}))
    found = read_schedule(str(path), "ViT-S-DeiT", "2.9")
    assert found | {"plan": "diffrate"} == DIFFRATE["2.9"]
    for wrong, says in (
        (("ViT-B-DeiT", "2.9"), "is unknown; did you mean 'ViT-S-DeiT'"),
        (("ViT-S-DeiT", "3.0"), "known: 2.3, 2.9"),
    ):
        with pytest.raises(ConfigError, match=says):
            read_schedule(str(path), *wrong)
    path.write_text("{")
    with pytest.raises(ConfigError, match="no schedule of DiffRate"):
        read_schedule(str(path), "ViT-S-DeiT", "2.9")


def test_schedules_pass_through_a_saved_predictor_and_the_benchmarks_flags(tmp_path, monkeypatch):
    model = small_model(depth=2, plan="tome", removed=(3, 4))
    tosa_jax.Predictor(model, mean=(0.5,), std=(0.5,)).save(tmp_path / "p.safetensors")
    loaded = from_weights(tmp_path / "p.safetensors", None, print)["model"]
    assert loaded.config == model.config and loaded.config.removed == (3, 4)
    seen = {}
    monkeypatch.setattr(bench, "measure", lambda *_, **fields: seen.update(fields) or [{}])
    assert bench.main(["--removed=3,4", "--json"]) == 0
    assert (seen["removed"], seen["merged_to"]) == ((3, 4), ())
    assert bench.main(["--removed=x"]) == 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"plan": "evit", "class_token": False, "global_pool": "avg"}, "has none"),
        (
            {"plan": "tome", "removed": (3, 3, 3)},
            "removed has 3 numbers, but the plan has 2 layers",
        ),
        ({"plan": "tome", "removed": (-1,)}, "has a negative number"),
        ({"plan": ("mctf", "mctf"), "mctf_information": "previous"}, "reads the layer before it"),
        (
            {
                "plan": "mctf",
                "mctf_information": "class",
                "class_token": False,
                "global_pool": "avg",
            },
            "mctf_information='class' reads the attention of the class token",
        ),
        ({"plan": "diffrate", "merged_to": (9, 8, 7)}, "a schedule for 3 layers, but depth=2"),
        ({"plan": "diffrate", "merged_to": (9, 1)}, "leaves layer 1 1 tokens; the least is 2"),
        ({"plan": ("evit", "standard", "psvit"), "depth": 3}, "'evit' before it may leave none"),
        ({"plan": ("evit", "standard", "expedit"), "depth": 3}, "needs all 17 tokens"),
        ({"plan": ("as_vit", "standard")}, "needs a standard layer before it"),
        ({"plan": "tome", "keep_rate": 0.2}, "merges half of the patches at most and leaves 9"),
    ],
)
def test_what_cannot_be_done_is_one_line(fields, says):
    with pytest.raises(ConfigError, match=says) as error:
        small_model(**({"depth": 2} | fields))
    assert "\n" not in str(error.value)
