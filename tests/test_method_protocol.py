"""Methods unlike those of the package, each one class and one row: nothing else changes for them.

Three of them reduce tokens for good, by merging or in clusters. Each of the others tries one part of what a layer kind
may do.
"""

import functools
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small import SIZES, forward, random_images, small_model, small_run
from unlike_kinds import (
    PREFIX,
    Cluster,
    FewQueries,
    Fuse,
    Gated,
    GatedFit,
    Hide,
    KeepMap,
    Merge,
    Parallel,
    ShareMap,
    seen,
)

from tosa_jax.errors import ConfigError
from tosa_jax.models.bypass_fit import fit_bypass
from tosa_jax.models.cost import gmacs
from tosa_jax.models.factory import control_config
from tosa_jax.models.method import METHODS, Method, controls, every_layer, register
from tosa_jax.models.params import get_params, set_params, split
from tosa_jax.models.plan import layer_specs
from tosa_jax.models.token_state import TokenState
from tosa_jax.ops.attention import attention
from tosa_jax.ops.reduction import Reduction, TokenWeights
from tosa_jax.ops.token_matching import bipartite_matching
from tosa_jax.performance import results
from tosa_jax.performance.benchmark import add_selector_overhead
from tosa_jax.performance.candidates import networks
from tosa_jax.reporting import charts, series
from tosa_jax.reporting.page import make_page
from tosa_jax.reporting.report import format_table
from tosa_jax.tasks import model_config
from tosa_jax.train.stages import plan_stages


@pytest.fixture
def added(monkeypatch):
    """All of them, registered for one test."""
    before = dict(METHODS)
    register(
        Method(name="fuse", kind=Fuse, label="fused for good"),
        Method(name="merge", kind=Merge, label="merged, and back", whole_plan=every_layer),
        Method(name="cluster", kind=Cluster),
        Method(name="parallel", kind=Parallel),
        Method(name="hide", kind=Hide),
        Method(name="few_queries", kind=FewQueries),
        Method(name="keep_map", kind=KeepMap),
        Method(name="share_map", kind=ShareMap),
        Method(name="gated", kind=Gated, fit_kind=GatedFit, free_choice=True),
    )
    yield
    for name in METHODS.keys() - before.keys():
        del METHODS[name]


def counts(plan):
    config = model_config("classification", "vit", **SIZES, plan=plan, keep_rate=0.5)
    return [(spec.count_in, spec.count_out) for spec in layer_specs(config)]


def test_each_kind_owns_its_counts(added):
    # 17 tokens: 8 of 16 patches stay beside the fused one, then 4 of 9.
    assert counts("fuse") == [(17, 17), (17, 10), (10, 10), (10, 6)]
    assert counts("merge") == [(17, 13), (13, 10), (10, 8), (8, 17)]
    plan = ("standard", "cluster", "cluster", "standard")
    assert counts(plan) == [(17, 17), (17, 5), (5, 17), (17, 17)]


def test_fused_tokens_stay_fused_and_are_copied_back(added):
    model = small_model(plan="fuse")

    @jax.jit
    def run(model, images):
        state = model.layers(model.embed(images), key=None, train=False)
        weights = [reduction.source.weights for reduction in state.persisting]
        return state.tokens, model.kinds[3].restore(state).tokens, *weights

    # Every token is a copy of one of the six, the prefix of itself, and the last fused one has the most copies.
    six, grid, first, second = map(np.asarray, run(model, random_images()))
    assert six.shape == (4, 6, 16) == forward(model, random_images()).tokens.shape
    for image in range(4):
        owner = (second[image] > 0).argmax(0)[(first[image] > 0).argmax(0)]
        np.testing.assert_allclose(grid[image], six[image][owner], atol=1e-5)
        assert owner[0] == 0 and set(owner) == set(range(6))


def test_merged_pairs_are_averaged_weigh_in_attention_and_come_back(added):
    model = small_model(plan=("merge", "merge", "standard", "standard"))
    out = np.asarray(forward(model, random_images()).tokens)

    @functools.partial(jax.jit, static_argnums=3)
    def attended(block, x, sizes, count):
        def attend(query, key, value):
            return attention(query, key, value, jnp.log(sizes)), key.mean(axis=2)

        update, keys = block.attn_branch(x, attend)
        return x + update, bipartite_matching(keys, count, PREFIX)[0].slot

    x = jax.jit(lambda model, images: model.embed(images))(model, random_images())
    sizes, owners = np.ones(x.shape[:2]), []
    for layer in range(2):
        block, count = model.blocks[layer], [13, 10][layer]
        x, slot = map(np.asarray, attended(block, x, sizes, count))
        merged, new = np.zeros((4, count, 16)), np.zeros((4, count))
        for b in range(4):
            np.add.at(merged[b], slot[b], x[b] * sizes[b][:, None])
            np.add.at(new[b], slot[b], sizes[b])
        x, sizes = (merged / new[..., None]).astype(np.float32), new
        x = np.asarray(jax.jit(lambda block, x: x + block.mlp_branch(x))(block, x))
        owners.append(slot)
    grid = np.stack([x[b][owners[1][b]][owners[0][b]] for b in range(4)])
    assert sizes.sum(axis=1).tolist() == [17.0] * 4 and sizes.max() > 1

    @jax.jit
    def rest(model, x):
        for block in list(model.blocks)[2:]:
            x, _ = block(x)
        return model.norm(x)

    np.testing.assert_allclose(out, rest(model, grid), atol=1e-5)


def test_clusters_are_means_and_rebuild_the_grid(added):
    model = small_model(plan=("standard", "cluster", "cluster", "standard"))

    @jax.jit
    def run(model, images):
        x, _ = model.blocks[0](model.embed(images))
        few = jnp.concatenate([x[:, :1], x[:, 1:].reshape(4, 4, 4, 16).mean(axis=2)], axis=1)
        for block in list(model.blocks)[1:3]:
            few, _ = block(few)
        x = jnp.concatenate([few[:, :1], jnp.repeat(few[:, 1:], 4, axis=1)], axis=1)
        return model.norm(model.blocks[3](x)[0])

    expected = run(model, random_images())
    np.testing.assert_allclose(forward(model, random_images()).tokens, expected, atol=1e-5)


def test_a_depth_network_reads_the_grid_where_tokens_are_fused_for_good(added):
    model = small_model(plan="fuse", task="depth", decoder_dim=4)
    assert model.config.intermediate_layers == (0, 1, 2, 3)
    graphdef, params = split(model)

    @jax.jit
    def run(params, images):
        model = set_params(graphdef, params)
        state = model.layers(model.embed(images), key=None, train=False)
        return state.intermediate, state.tokens, model(images).depth

    read, last, depth = run(params, random_images())
    assert depth.shape == (4, 8, 8) and np.isfinite(depth).all()
    # After each layer all 17 tokens are there, copies of as many as the layer left.
    for layer, count in enumerate((17, 10, 10, 6)):
        assert read[layer].shape == (4, 17, 16)
        for grid in np.asarray(read[layer]):
            assert len(np.unique(grid, axis=0)) == count
    for grid, few in zip(np.asarray(read[3]), np.asarray(last), strict=True):
        np.testing.assert_array_equal(np.unique(grid, axis=0), np.unique(few, axis=0))


def run_layers(model, tokens):
    graphdef, params = split(model)

    @jax.jit
    def run(params, tokens):
        return set_params(graphdef, params).layers(tokens, key=None, train=False).tokens

    return np.asarray(run(params, tokens))


def through(model, tokens, layers):
    """Tokens after some blocks, each run densely."""
    for layer in layers:
        tokens, _ = model.blocks[layer](tokens)
    return tokens


def test_a_kind_builds_its_own_block(added):
    model = small_model(plan=("standard", "parallel", "standard", "standard"))
    shapes = {path: x.shape for path, x in get_params(model).items()}
    assert shapes["blocks/0/mlp/fc1/kernel"] == (16, 32)
    assert shapes["blocks/1/mlp/fc1/kernel"] == (16, 64)
    assert model.macs() - small_model().macs() == 17 * 2 * 16 * 32
    tokens = model.embed(random_images())
    x, block = through(model, tokens, [0]), model.blocks[1]
    x = x + block.attn(block.norm1(x))[0] + block.mlp(block.norm2(x))
    np.testing.assert_allclose(run_layers(model, tokens), through(model, x, [2, 3]), atol=1e-5)


def test_a_masked_token_is_read_by_nobody(added):
    model = small_model(plan=("hide", "standard", "standard", "standard"))
    tokens, mask = model.embed(random_images()), seen(17)
    out = run_layers(model, tokens)
    other = run_layers(model, tokens.at[:, 3].add(1.0))
    assert not mask[3] and np.abs(other[:, 3] - out[:, 3]).max() > 0.1
    np.testing.assert_array_equal(np.delete(other, 3, axis=1), np.delete(out, 3, axis=1))
    # The others come out as if there were no more than they.
    alone = through(model, tokens[:, mask], range(4))
    np.testing.assert_allclose(out[:, mask], alone, atol=1e-5)


def test_fewer_queries_than_keys(added):
    model = small_model(plan=("standard", "few_queries", "standard", "standard"))
    tokens = model.embed(random_images())
    before = through(model, tokens, [0])
    moved = through(model, before, [1])
    patches = np.linalg.norm(before[:, PREFIX:], axis=-1)
    x = np.array(before)
    for image in range(4):
        rows = [0, *(PREFIX + np.argsort(-patches[image])[:8])]
        x[image, rows] = moved[image, rows]
    expected = through(model, jnp.asarray(x), [2, 3])
    np.testing.assert_allclose(run_layers(model, tokens), expected, atol=1e-5)
    # Queries and their projection for 9 tokens, keys and values for 17, logits and sums for 9 x 17.
    layer = 2 * 9 * 16**2 + 2 * 17 * 16**2 + 2 * 9 * 17 * 16 + 9 * 1024
    assert model.macs() - small_model().macs() == layer - model.blocks[1].macs(17)


def test_a_layer_uses_the_attention_map_of_the_one_before(added):
    model = small_model(plan=("keep_map", "share_map") * 2)
    tokens = model.embed(random_images())
    x, attn_map = tokens, None
    for layer, block in enumerate(model.blocks):
        qkv = block.attn.qkv(block.norm1(x)).reshape(4, 17, 3, 2, 8).transpose(2, 0, 3, 1, 4)
        query, key, value = qkv  # [b h n d]
        if layer in (0, 2):
            weights = jnp.exp(query @ key.swapaxes(2, 3) / 8**0.5)
            attn_map = weights / weights.sum(axis=-1, keepdims=True)
        x = x + block.attn.proj((attn_map @ value).swapaxes(1, 2).reshape(4, 17, 16))
        x = x + block.mlp_branch(x)
    np.testing.assert_allclose(run_layers(model, tokens), x, atol=1e-5)
    scanned = small_model(plan=("keep_map", "share_map") * 2, scan_layers=True)
    np.testing.assert_allclose(run_layers(scanned, tokens), x, atol=1e-5)


def test_a_map_that_is_not_there_is_one_line(added):
    model = small_model(plan=("standard", "share_map", "standard", "standard"))
    with pytest.raises(ConfigError, match="uses the attention map of an earlier one") as error:
        jax.eval_shape(lambda: model(random_images()))
    assert "\n" not in str(error.value)
    # It is of the tokens that the layer ran on, and ends with them.
    tokens, few = jnp.zeros((1, 3, 4)), jnp.zeros((1, 2, 4))
    state = TokenState(tokens, attention_map=jnp.ones((1, 2, 3, 3)) / 3)
    assert state.restored().shared_map.shape == state.restored_grid().shared_map.shape
    reduction = Reduction(TokenWeights(jnp.ones((1, 2, 3)) / 3))
    for fewer in (state.opened(few, reduction), state.reduced(few, reduction)):
        assert fewer.attention_map is None
        fewer = fewer._replace(attention_map=jnp.ones((1, 2, 2, 2)) / 2)
        assert fewer.restored_grid().attention_map is None


def test_a_kind_brings_what_the_selector_stage_fits_and_the_benchmark_subtracts(added):
    run = small_run(
        "", model={"plan": "gated"}, pretrain={"steps": 1}, selector={"steps": 1}, finetune={"steps": 1}
    )  # fmt: skip
    stages, _ = plan_stages(run)
    assert [s.model.plan[1] for s in stages] == ["standard", "gated_fit", "gated"]
    paths = list(get_params(small_model(plan="gated")))
    trained = [{path for path in paths if re.search(s.trainable, path)} for s in stages]
    gates = {f"kinds/{layer}/gate/{part}" for layer in (1, 3) for part in ("kernel", "bias")}
    assert trained == [set(paths), gates, set(paths) - gates]
    records = [
        {"name": name, "keep_rate": 0.5, "ms": ms}
        for name, ms in (("dense", 8.0), ("tosa", 6.0), ("gated", 4.0), ("previous", 1.0))
    ]
    overheads = [r["selector_overhead"] for r in add_selector_overhead(records)]
    assert overheads == [None, 0.25, None, None]

    model = small_model(plan=("standard", "standard", "standard", "gated"))
    images = [random_images(32, seed) for seed in range(2)]
    fitted = fit_bypass(model, images, ridge=1e-6)
    assert fitted.keys() == {"kinds/3/gate/kernel", "kinds/3/gate/bias"}
    x = through(model, model.embed(jnp.concatenate(images)), range(3))
    update = np.linalg.norm((through(model, x, [3]) - x)[:, PREFIX:], axis=-1).ravel()
    x = np.asarray(model.blocks[3].norm1(x)[:, PREFIX:], np.float64).reshape(len(update), 16)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    best, *_ = np.linalg.lstsq(x, update)
    found = np.concatenate([fitted["kinds/3/gate/kernel"][:, 0], fitted["kinds/3/gate/bias"]])
    errors = [np.square(x @ weights - update).mean() for weights in (found, best)]
    assert errors[0] < 1.001 * errors[1] < 0.9 * update.var()


def test_a_run_and_its_report_and_the_benchmarks_plot_take_them_by_their_rows(added):
    run = small_run(
        "",
        model={"plan": "cluster"},
        pretrain={"steps": 1},
        finetune={"steps": 1},
        eval={"controls": ("fuse", "merge"), "keep_rates": (0.5, 0.25)},
    )
    stages, rows = plan_stages(run)
    fine_tuned = ["finetune", "finetune_0.25"]
    fine_tuned += [f"finetune_{name}_{rate}" for name in ("fuse", "merge") for rate in (0.5, 0.25)]
    assert [stage.name for stage in stages] == ["pretrain", *fine_tuned]
    assert [row.model.plan[1] for row in rows[1:]] == ["cluster"] * 2 + ["fuse"] * 2 + ["merge"] * 2
    assert set(rows[-1].model.plan) == {"merge"}  # in every layer

    steps = [
        {"stage": stage.name, "step": step, "train/loss": 1.0 / (step + i)}
        for i, stage in enumerate(stages)
        for step in (1, 2, 3)
    ]
    facts = {stage.name: {"row": stage.row, "keep_rate": stage.keep_rate} for stage in stages}
    found = [
        {"name": row.name, "keep_rate": row.keep_rate, "gmacs": 1.0, "metrics": {"acc1": 0.5}}
        for row in rows
    ]
    report = {"results": found, "stages": facts}
    table = format_table(report).splitlines()
    assert [line for line in table if "merged, and back" in line and "0.25" in line]
    lines = charts.curves(steps, fine_tuned, "train/loss", facts=facts)
    labels = [line.label for line in lines]
    assert labels[2:] == [
        "fused for good 0.5", "fused for good 0.25", "merged, and back 0.5", "merged, and back 0.25"
    ]  # fmt: skip
    assert [line.method for line in lines[2:]] == ["fuse", "fuse", "merge", "merge"]
    assert charts.css_colour("merge") in charts.line_chart(lines)

    timed = [
        {"name": name, "keep_rate": None, "batch_size": 1, "gmacs": gmacs, "speedup": 1.0, "img_per_sec": 9.0,
         "train": False, "image_size": 8, "dtype": "float32"}
        for name, gmacs in (("dense", 2.0), ("merge", 1.0))
    ]  # fmt: skip
    png = results.plot({"rows": timed, "device": "1 x cpu"})
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    colour = np.array([int(series.colours("merge")[0][i : i + 2], 16) for i in (1, 3, 5)])
    assert (abs(image - colour[None, None]).max(axis=2) < 8).sum() > 20


def test_costs_tables_and_charts_take_them_by_their_rows(added):
    def block(n, mlp=None):  # width 16, MLP of 2 * 16 * 32 weights a token
        return 4 * n * 16**2 + 2 * n**2 * 16 + (n if mlp is None else mlp) * 1024

    def make(**fields):
        return model_config("classification", "vit", **(SIZES | fields))

    names = ("fuse", "merge", "cluster")
    assert set(names) <= set(controls(timed=True))
    found = {name: config for name, _, config in networks(make, [0.5], names)}
    fixed = 16 * 4 * 16 + 16 * 10  # patches and head
    assert gmacs(found["fuse"]) * 1e9 == 2 * block(17) + 2 * block(10) + fixed
    layers = block(17, 13) + block(13, 10) + block(10, 8) + block(8, 7)
    assert gmacs(found["merge"]) * 1e9 == layers + fixed
    assert control_config(found["tosa"], "fuse") == found["fuse"]
    rows = [
        {"name": name, "keep_rate": 0.5, "gmacs": 1.0 + i, "metrics": {"acc1": 0.5 + i / 10}}
        for i, name in enumerate(("dense", *names))
    ]
    report = {"results": rows, "stages": {}}
    assert "merged, and back" in format_table(report) and "fused for good" in format_table(report)
    page = make_page("run", report, [], None).partition("</style>")[2]
    assert all(charts.css_colour(name) in page for name in names)


def test_the_last_layer_may_leave_out_tokens_that_nobody_reads(added):
    """Also one that rebuilds its tokens at its end: 17 clusters of 64 patches, of which 8 rows are worked out."""
    model = small_model(plan=("standard", "cluster") * 2, image_size=16)
    images = jnp.tile(random_images(2), (1, 2, 2, 1))
    whole = jax.jit(lambda x: model(x).logits)(images)
    part = jax.jit(lambda x: model(x, tokens=False).logits)(images)
    np.testing.assert_allclose(part, whole, atol=1e-5)


def test_an_unknown_method_is_one_line():
    with pytest.raises(ConfigError, match="'mrge' is unknown"):
        small_model(plan="mrge")
    with pytest.raises(ConfigError, match="already a method 'random'"):
        register(METHODS["random"])
