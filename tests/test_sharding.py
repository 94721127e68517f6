"""The mesh: one table, shard shapes, and the same training on every mesh."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small import small_model

from tosa_jax.errors import ConfigError
from tosa_jax.models.params import split
from tosa_jax.optim import OptimConfig, learning_rate, make_optimizer
from tosa_jax.sharding import (
    MeshConfig,
    check_batch,
    make_mesh,
    spec_for,
    to_global,
    tree_shardings,
)
from tosa_jax.steps import StepSetup, init_state
from tosa_jax.tasks.classification import Classification
from tosa_jax.train import compile_step

MESHES = {
    "one": (1, 1, 1),
    "data": (8, 1, 1),
    "all": (2, 2, 2),
    "fsdp": (1, 8, 1),
}


def mesh_of(sizes):
    config = MeshConfig(data=sizes[0], fsdp=sizes[1], model=sizes[2])
    return make_mesh(config, jax.devices()[: int(np.prod(sizes))])


@functools.cache
def setup():
    graphdef, params = split(small_model(keep_rate=0.5, drop_path_rate=0.1))
    optim = OptimConfig(steps=20, learning_rate=1e-3, warmup_steps=3, ema_decay=0.9, clip_norm=1.0)
    task = Classification(num_classes=10, mean=(0.5,), std=(0.5,), label_smoothing=0.1)
    return StepSetup(
        graphdef, task, make_optimizer(optim), learning_rate(optim), optim.ema_decay, 0, 1
    ), jax.tree.map(np.asarray, params)


def batches(count=20, size=16):
    """The same batch over and over, which is learned by heart: its loss falls."""
    rng = np.random.default_rng(1)
    batch = {
        "image": rng.integers(0, 256, (size, 8, 8, 1), np.uint8),
        "label": rng.integers(0, 10, size).astype(np.int32),
    }
    yield from [batch] * count


def start(mesh):
    step_setup, params = setup()
    init = functools.partial(init_state, step_setup, params, {})
    shardings = tree_shardings(jax.eval_shape(init), mesh)
    return jax.jit(init, out_shardings=shardings)(), shardings


@functools.cache
def losses(name):
    mesh = mesh_of(MESHES[name])
    state, shardings = start(mesh)
    step = compile_step(setup()[0], shardings, mesh)
    values = []
    for batch in batches():
        state, metrics = step(state, to_global(batch, mesh))
        values.append(float(metrics["loss"]))
    assert step._cache_size() == 1, "the step was traced more than once"
    return values


@pytest.mark.parametrize("name", ["data", "all", "fsdp"])
def test_the_same_losses_on_every_mesh(name):
    assert np.mean(losses("one")[-5:]) < np.mean(losses("one")[:5]) - 0.05
    np.testing.assert_allclose(losses(name), losses("one"), atol=1e-5)


def test_state_is_born_sharded_with_its_moments_and_average():
    state, _ = start(mesh_of(MESHES["all"]))
    shapes = {
        "blocks/0/attn/qkv/kernel": (8, 24),  # [16, 48] over fsdp x model
        "blocks/0/mlp/fc1/bias": (16,),
        "blocks/0/attn/proj/kernel": (8, 8),
        "head/kernel": (8, 10),
        "pos_embed": (1, 17, 16),
        "kinds/1/selector/conv1/kernel": (1, 2, 4),
    }
    moments = state.opt[1][0]
    for tree in (state.params, state.ema, moments.mu, moments.nu):
        for name, shape in shapes.items():
            assert tree[name].sharding.shard_shape(tree[name].shape) == shape, name
    assert state.step.sharding.is_fully_replicated


def test_an_axis_that_does_not_divide_is_left_out():
    mesh = mesh_of(MESHES["all"])
    assert spec_for("blocks/3/attn/qkv/kernel", (16, 48), mesh) == P("fsdp", "model")
    assert spec_for("blocks/3/attn/qkv/kernel", (15, 48), mesh) == P(None, "model")
    assert spec_for("cls_token", (1, 1, 16), mesh) == P()


def test_batches_are_split_over_data_and_fsdp():
    mesh = mesh_of(MESHES["all"])
    batch = to_global(next(batches()), mesh)
    assert batch["image"].sharding.shard_shape((16, 8, 8, 1)) == (4, 8, 8, 1)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [((3, 1, 1), "needs 3 devices, but there are 8"), ((-1, -1, 1), "one of them may be -1")],
)
def test_meshes_that_do_not_fit(sizes, says):
    with pytest.raises(ConfigError, match=says):
        make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], model=sizes[2]))


def test_batches_that_do_not_fit():
    mesh = make_mesh(MeshConfig())
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "model": 1}
    check_batch("batch_size", 24, mesh)
    with pytest.raises(ConfigError, match="batch_size=20 .* the nearest that is: 16"):
        check_batch("batch_size", 20, mesh)
