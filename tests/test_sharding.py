"""The mesh: one table, shard shapes, the same training on every mesh, and what each mesh sends."""

import functools

import jax
import numpy as np
import optax
import pytest
from golden.pretrained_cases import quickly_drawn
from jax.sharding import PartitionSpec as P
from small import SIZES, small_model

from tosa_jax.distributed.mesh import (
    MeshConfig,
    check_batch,
    make_mesh,
    mesh_sizes,
    spec_for,
    to_global,
    tree_shardings,
)
from tosa_jax.errors import ConfigError
from tosa_jax.models.optim import OptimConfig, learning_rate, make_optimizer, split_trainable
from tosa_jax.models.params import split
from tosa_jax.performance.collectives import collectives, totals
from tosa_jax.tasks.classification import Classification
from tosa_jax.tasks.mixing import MixingConfig
from tosa_jax.train.loop import jit_step
from tosa_jax.train.step import StepSetup, init_state

MESHES = {
    "one": MeshConfig(data=1),
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "slices": MeshConfig(dcn=2, data=2, fsdp=2),
    "all": MeshConfig(data=2, fsdp=2, model=2),
}


def mesh_of(name):
    return make_mesh(MESHES[name], jax.devices()[: 1 if name == "one" else 8])


@functools.cache
def setup(width=16, mixing=MixingConfig(), accumulate=1, plain=False, **fields):  # noqa: B008
    """`plain`: gradient descent without a moving average, which compiles faster. What is wide is only compiled."""
    network = {"depth": 2, "embed_dim": width, "drop_path_rate": 0.1, "plan": "selective"} | fields
    graphdef, params = split(
        small_model(**network) if width == 16 else quickly_drawn("vit", **SIZES | network)
    )
    optim = OptimConfig(
        steps=20, learning_rate=1e-3, warmup_steps=3, ema_decay=0.0 if plain else 0.9, clip_norm=1.0
    )
    task = Classification(
        num_classes=10, mean=(0.5,), std=(0.5,), label_smoothing=0.1, mixing=mixing
    )
    return StepSetup(
        graphdef, task, optax.sgd(0.1) if plain else make_optimizer(optim), learning_rate(optim),
        optim.ema_decay, 0, 1, accumulate=accumulate,
    ), jax.tree.map(np.asarray, params)  # fmt: skip


def batch_on(mesh, size=16):
    rng = np.random.default_rng(1)
    batch = {
        "image": rng.integers(0, 256, (size, 8, 8, 1), np.uint8),
        "label": rng.integers(0, 10, size).astype(np.int32),
    }
    return to_global(batch, mesh)


def initial(mesh, **fields):
    """What makes a new state, and its shardings; selectors are frozen, as in fine-tuning."""
    step_setup, params = setup(**fields)
    trained, frozen = split_trainable(params, r"^(?!kinds/\d+/selector/)")
    init = functools.partial(init_state, step_setup, trained, frozen)
    return init, tree_shardings(jax.eval_shape(init), mesh)


def start(mesh, **fields):
    init, shardings = initial(mesh, **fields)
    return jax.jit(init, out_shardings=shardings)()


@functools.cache
def compiled_step(name, size=16, **fields):
    """It raises an error where jit would trace it again: if a state that it returned were not as one it takes."""
    mesh = mesh_of(name)
    init, shardings = initial(mesh, **fields)
    step = jit_step(setup(**fields)[0], shardings, mesh)
    return step.lower(jax.eval_shape(init), batch_on(mesh, size)).compile()


@functools.cache
def losses(name):
    """Those of 12 updates on one batch, which is learned by heart."""
    mesh = mesh_of(name)
    state, batch = start(mesh), batch_on(mesh)
    values = []
    for _ in range(12):
        state, metrics = compiled_step(name)(state, batch)
        values.append(float(metrics["loss"]))
    return values


@pytest.mark.parametrize("name", ["data", "slices", "all"])
def test_the_same_losses_on_every_mesh(name):
    assert np.mean(losses("one")[-5:]) < np.mean(losses("one")[:5]) - 0.05
    np.testing.assert_allclose(losses(name), losses("one"), atol=1e-5)


def test_state_is_born_sharded_with_its_moments_and_average():
    state = start(mesh_of("all"))
    shapes = {
        "blocks/0/attn/qkv/kernel": (8, 24),  # [16, 48] over fsdp x model
        "blocks/0/mlp/fc1/bias": (16,),
        "blocks/0/attn/proj/kernel": (8, 8),
        "head/kernel": (8, 10),
        "pos_embed": (1, 17, 16),
    }
    moments = state.opt[1][0]
    for tree in (state.params, state.ema, moments.mu, moments.nu):
        for name, shape in shapes.items():
            assert tree[name].sharding.shard_shape(tree[name].shape) == shape, name
        assert {k: x.sharding for k, x in tree.items()} == {
            k: x.sharding for k, x in state.params.items()
        }
    assert state.step.sharding.is_fully_replicated


def test_an_axis_that_does_not_divide_is_left_out():
    mesh = mesh_of("all")
    assert spec_for("blocks/3/attn/qkv/kernel", (16, 48), mesh) == P("fsdp", "model")
    assert spec_for("blocks/3/attn/qkv/kernel", (15, 48), mesh) == P(None, "model")
    assert spec_for("cls_token", (1, 1, 16), mesh) == P()


def test_batches_are_split_over_data_and_fsdp():
    mesh = mesh_of("all")
    batch = batch_on(mesh)
    assert batch["image"].sharding.shard_shape((16, 8, 8, 1)) == (4, 8, 8, 1)


@pytest.mark.parametrize(
    ("axes", "slices", "sizes"),
    [
        ({}, 1, [1, 8, 1, 1]),
        ({}, 2, [2, 4, 1, 1]),  # the same command on more slices
        ({"fsdp": -1, "data": 2}, 2, [2, 2, 2, 1]),
        ({"dcn": 4, "model": 2}, 1, [4, 1, 1, 2]),
    ],
)
def test_meshes_take_what_is_there(axes, slices, sizes):
    found = mesh_sizes(MeshConfig(**axes), [4, 4], slices)
    assert found == dict(zip(("dcn", "data", "fsdp", "model"), sizes, strict=True))


@pytest.mark.parametrize(
    ("axes", "slices", "says"),
    [
        ({"data": 3}, 1, "data=3, fsdp=1, model=1 needs 3 devices, but there are 8"),
        ({"fsdp": -1}, 1, "one of data, fsdp and model may be -1"),
        ({"dcn": -1}, 1, "one of data, fsdp and model may be -1"),
        ({"dcn": 4}, 2, "dcn=4, but the devices are on 2 slices"),
        ({"model": 8}, 1, "model=8 does not divide the 4 devices of a process"),
    ],
)
def test_meshes_that_do_not_fit(axes, slices, says):
    with pytest.raises(ConfigError, match=says):
        mesh_sizes(MeshConfig(**axes), [4, 4], slices)


def test_each_axis_has_its_size_and_devices_stand_in_the_order_of_their_processes():
    mesh = make_mesh(MeshConfig(fsdp=4, model=2), jax.devices()[::-1])
    assert dict(mesh.shape) == {"dcn": 1, "data": 1, "fsdp": 4, "model": 2}
    assert [device.id for device in mesh.devices.flat] == list(range(8))


def test_batches_that_do_not_fit():
    mesh = make_mesh(MeshConfig())
    check_batch("batch_size", 24, mesh)
    with pytest.raises(ConfigError, match="batch_size=20 .* the nearest that is: 16"):
        check_batch("batch_size", 20, mesh)
    with pytest.raises(ConfigError, match="x accumulate = 16; the nearest that is: 32"):
        check_batch("batch_size", 24, mesh, accumulate=2)


@pytest.mark.compiler
def test_a_batch_in_parts_gives_the_same_update_and_moves_no_more_examples():
    mesh, results, found = mesh_of("data"), [], []
    batch = batch_on(mesh, size=32)
    for parts in (1, 2):
        fields = {"mixing": MixingConfig(mixup=0.8), "accumulate": parts, "plain": True}
        state, step = start(mesh, **fields), compiled_step("data", size=32, **fields)
        for _ in range(3):
            state, metrics = step(state, batch)
        results.append(jax.device_get((metrics, state.params)))
        found.append(totals(collectives(step.as_text())))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *results)
    one, two = found
    # Mixing fetches each image's partner, once; gradients are reduced once a part.
    assert one.keys() == two.keys() == {"all-reduce", "collective-permute"}
    assert one["collective-permute"] == two["collective-permute"]
    assert two["all-reduce"]["bytes"] < 2.01 * one["all-reduce"]["bytes"]


# What a step sends. XLA writes a reduce-scatter on CPU as an all-reduce of which each device keeps its part.


@functools.cache
def sent(name, **fields):
    return tuple(collectives(compiled_step(name, **fields).as_text()))


def parameter_bytes(name, sharded, **fields):
    """Bytes of the trained parameters that are split, or of those that are not."""
    _, shardings = initial(mesh_of(name), **fields)
    params = setup(**fields)[1]
    return sum(
        params[path].nbytes
        for path, sharding in shardings.params.items()
        if sharded != sharding.is_fully_replicated
    )


@pytest.mark.compiler
def test_data_parallel_training_reduces_gradients_and_nothing_else():
    assert sent("one") == ()
    found = totals(sent("data"))
    assert found.keys() == {"all-reduce"}
    gradients = parameter_bytes("data", sharded=False)
    assert gradients <= found["all-reduce"]["bytes"] < 1.01 * gradients


@pytest.mark.compiler
def test_fsdp_gathers_parameters_and_reduces_gradients():
    # So wide that moving a device's few activations would cost less than gathering parameters.
    found = totals(sent("fsdp", width=128))
    assert found.keys() == {"all-gather", "all-reduce"}
    shards = parameter_bytes("fsdp", sharded=True, width=128)
    gradients = shards + parameter_bytes("fsdp", sharded=False, width=128)
    # Each parameter is gathered once, or once more for the backward pass, and no activation ever is.
    assert shards <= found["all-gather"]["bytes"] <= 2 * shards and shards > 0.8 * gradients
    sizes = {x.nbytes for x in setup(width=128)[1].values()}
    assert {one.bytes for one in sent("fsdp", width=128) if one.kind == "all-gather"} <= sizes
    assert gradients <= found["all-reduce"]["bytes"] < 1.01 * gradients


@pytest.mark.compiler
def test_a_scanned_layer_is_gathered_when_it_runs():
    fields = {"width": 128, "depth": 4, "scan_layers": True, "plain": True}
    gathers = [one for one in sent("fsdp", **fields) if one.kind == "all-gather"]
    # A matrix at a time, each for the forward pass and at most once more for the backward pass.
    largest = max(x.nbytes for x in setup(**fields)[1].values())
    assert max(one.bytes for one in gathers) <= largest
    split = parameter_bytes("fsdp", sharded=True, **fields)
    assert split <= sum(one.bytes * one.runs for one in gathers) <= 2 * split
    assert {one.runs for one in gathers} == {1, 2}


@pytest.mark.compiler
def test_memory_of_scanned_layers_does_not_hold_whole_layers():
    fields = {"width": 64, "scan_layers": True, "remat": "full", "plain": True, "plan": "standard"}

    def temporaries_and_parameters(depth):
        memory = compiled_step("fsdp", size=8, depth=depth, **fields).memory_analysis()
        parts = [parameter_bytes("fsdp", x, depth=depth, **fields) for x in (True, False)]
        return np.array([memory.temp_size_in_bytes, sum(parts)])

    temporaries, parameters = temporaries_and_parameters(5) - temporaries_and_parameters(3)
    assert temporaries < parameters / 2


@pytest.mark.compiler
def test_between_slices_nothing_is_gathered():
    within = {frozenset({0, 1}), frozenset({2, 3}), frozenset({4, 5}), frozenset({6, 7})}
    gathers = [one for one in sent("slices") if one.kind == "all-gather"]
    assert {frozenset(group) for one in gathers for group in one.groups} == within
    across = [one for one in sent("slices") if max(map(len, one.groups)) > 2]
    assert across and all(one.kind == "all-reduce" for one in across)


@pytest.mark.compiler
def test_selective_layers_send_nothing():
    """On the mesh with all axes over which a batch is split."""
    assert totals(sent("slices")) == totals(sent("slices", plan="standard"))
