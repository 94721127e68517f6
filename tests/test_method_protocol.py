"""Three methods unlike those of the package, each one class and one row: nothing else changes for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SIZES, forward, random_images, small_model

from tosa_jax.errors import ConfigError
from tosa_jax.models.cost import gmacs
from tosa_jax.models.factory import control_config
from tosa_jax.models.method import METHODS, Method, controls, register
from tosa_jax.models.methods.standard import Standard
from tosa_jax.models.plan import layer_specs
from tosa_jax.ops.attention import attention
from tosa_jax.ops.reduction import Reduction, TokenWeights, pooled
from tosa_jax.ops.token_matching import bipartite_matching
from tosa_jax.ops.token_selection import select_tokens
from tosa_jax.performance.candidates import networks
from tosa_jax.reporting import charts
from tosa_jax.reporting.page import make_page
from tosa_jax.reporting.report import format_table
from tosa_jax.tasks import model_config

PREFIX = 1


class Fuse(Standard):
    """Keeps half of the patches and the mean of the others, for good (as EViT; here by the size of the tokens)."""

    selects = nests = True

    @classmethod
    def counted(cls, config, spec, keep_rate):
        kept = PREFIX + (spec.count_in - PREFIX) // 2
        return spec._replace(closes=False, count=kept + 1, count_out=kept + 1)

    def apply(self, block, state, context):
        state = super().apply(block, state, context)
        tokens = state.tokens
        kept = select_tokens(jnp.linalg.norm(tokens, axis=-1), self.spec.count - 1, PREFIX)
        others = (~kept.mask).astype(tokens.dtype)
        rows = jax.nn.one_hot(kept.indices, tokens.shape[1], dtype=tokens.dtype)
        fused = others / others.sum(axis=1, keepdims=True)
        reduction = Reduction(TokenWeights(jnp.concatenate([rows, fused[:, None]], axis=1)))
        return state.reduced(reduction.merge(tokens), reduction)

    def block_macs(self, block):
        return block.macs(self.spec.count_in)


class Merge(Standard):
    """Merges a quarter of the patches between the branches, with sizes, and unmerges after the last one (ToMe)."""

    selects = nests = True

    @classmethod
    def counted(cls, config, spec, keep_rate):
        count = spec.count_in - (spec.count_in - PREFIX) // 4
        return spec._replace(count=count, count_out=spec.count_group if spec.closes else count)

    def apply(self, block, state, context):
        before, context = state, context.weighing(state.sizes, state.mask)

        def attend(query, key, value):
            out, summary = context.attention_fn(query, key, value)
            return out, (summary, key.mean(axis=2))

        def between(tokens, reported):
            summary, keys = reported
            chosen, scores = bipartite_matching(keys, self.spec.count, PREFIX)
            sizes = jnp.ones(tokens.shape[:2]) if before.sizes is None else before.sizes
            reduction = pooled(chosen, sizes)
            inside = before.opened(reduction.merge(tokens), reduction, scores)
            return inside.tokens, (summary, inside)

        tokens, (summary, state) = block(state.tokens, attend, context.drop, between)
        state = state._replace(tokens=tokens, summary=summary)
        return state.restored() if self.spec.closes else state

    def block_macs(self, block):
        return block.attn_macs(self.spec.count_in) + block.mlp_macs(self.spec.count)


class Cluster(Standard):
    """Runs a group of layers on the means of four patches, and rebuilds all tokens after it (as Expedit)."""

    selects = True

    @classmethod
    def counted(cls, config, spec, keep_rate):
        count = spec.count_in if keep_rate is None else PREFIX + (spec.count_in - PREFIX) // 4
        return spec._replace(count=count, count_out=spec.count_group if spec.closes else count)

    def apply(self, block, state, context):
        if self.spec.opens:
            b, n, _ = state.tokens.shape
            weights = np.zeros((self.spec.count, n), np.float32)
            weights[:PREFIX, :PREFIX] = 1
            for i in range(PREFIX, self.spec.count):
                weights[i, PREFIX + 4 * (i - PREFIX) : PREFIX + 4 * (i - PREFIX + 1)] = 0.25
            weights = jnp.broadcast_to(jnp.asarray(weights), (b, *weights.shape))
            reduction = Reduction(TokenWeights(weights))
            state = state.opened(reduction.merge(state.tokens), reduction)
        state = super().apply(block, state, context)
        return state.restored() if self.spec.closes else state


@pytest.fixture
def added(monkeypatch):
    """The three, registered for one test."""
    before = dict(METHODS)
    register(
        Method(name="fuse", kind=Fuse, label="fused for good"),
        Method(name="merge", kind=Merge, label="merged, and back", every_layer=True),
        Method(name="cluster", kind=Cluster),
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
    state = model.layers(model.embed(random_images()), key=None, train=False)
    assert state.tokens.shape == (4, 6, 16) == forward(model, random_images()).tokens.shape
    grid = np.asarray(model.kinds[3].restore(state).tokens)
    # Every token is a copy of one of the six, the prefix of itself, and the last fused one has the most copies.
    six, first = np.asarray(state.tokens), np.asarray(state.persisting[0].source.weights)
    second = np.asarray(state.persisting[1].source.weights)
    for image in range(4):
        owner = (second[image] > 0).argmax(0)[(first[image] > 0).argmax(0)]
        np.testing.assert_allclose(grid[image], six[image][owner], atol=1e-5)
        assert owner[0] == 0 and set(owner) == set(range(6))


def test_merged_pairs_are_averaged_weigh_in_attention_and_come_back(added):
    model = small_model(plan=("merge", "merge", "standard", "standard"))
    tokens = model.embed(random_images())
    out = np.asarray(forward(model, random_images()).tokens)
    x, sizes, owners = tokens, np.ones(tokens.shape[:2]), []
    for layer in range(2):
        block, keys = model.blocks[layer], None

        def attend(query, key, value, sizes=sizes):
            return attention(query, key, value, jnp.log(jnp.asarray(sizes))), key.mean(axis=2)

        update, keys = block.attn_branch(x, attend)
        x, count = np.asarray(x + update), [13, 10][layer]
        slot = np.asarray(bipartite_matching(keys, count, PREFIX)[0].slot)
        merged, new = np.zeros((4, count, 16)), np.zeros((4, count))
        for b in range(4):
            np.add.at(merged[b], slot[b], x[b] * sizes[b][:, None])
            np.add.at(new[b], slot[b], sizes[b])
        x, sizes = jnp.asarray(merged / new[..., None], jnp.float32), new
        x = x + block.mlp_branch(x)
        owners.append(slot)
    grid = jnp.stack([x[b][owners[1][b]][owners[0][b]] for b in range(4)])
    assert sizes.sum(axis=1).tolist() == [17.0] * 4 and sizes.max() > 1
    for block in list(model.blocks)[2:]:
        grid, _ = block(grid)
    np.testing.assert_allclose(out, model.norm(grid), atol=1e-5)


def test_clusters_are_means_and_rebuild_the_grid(added):
    model = small_model(plan=("standard", "cluster", "cluster", "standard"))
    x, _ = model.blocks[0](model.embed(random_images()))
    few = jnp.concatenate([x[:, :1], x[:, 1:].reshape(4, 4, 4, 16).mean(axis=2)], axis=1)
    for block in list(model.blocks)[1:3]:
        few, _ = block(few)
    x = jnp.concatenate([few[:, :1], jnp.repeat(few[:, 1:], 4, axis=1)], axis=1)
    expected = model.norm(model.blocks[3](x)[0])
    np.testing.assert_allclose(forward(model, random_images()).tokens, expected, atol=1e-5)


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


def test_an_unknown_method_is_one_line():
    with pytest.raises(ConfigError, match="'mrge' is unknown"):
        small_model(plan="mrge")
    with pytest.raises(ConfigError, match="already a method 'random'"):
        register(METHODS["random"])
