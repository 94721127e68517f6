"""Running statistics in a training step: measured over all devices, moved by no optimizer."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from tosa_jax.distributed.mesh import MeshConfig, make_mesh, to_global, tree_shardings
from tosa_jax.models.batch_norm import BatchNorm, below
from tosa_jax.models.optim import OptimConfig, learning_rate, make_optimizer, split_trainable
from tosa_jax.models.params import split
from tosa_jax.models.vit import Output
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.tasks.classification import Classification
from tosa_jax.train.loop import jit_step
from tosa_jax.train.step import StepSetup, init_state

RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.integers(0, 256, (16, 2, 2, 3), np.uint8),
    "label": np.arange(16, dtype=np.int32) % 10,
}
STEPS, LEFT = 3, 0.9**3
"""Updates, and the share of the first running statistics that is then left."""


class Small(nnx.Module):
    """Batch norm and a head."""

    gather_params = None

    def __init__(self) -> None:
        self.config = ViTConfig()
        self.norm = BatchNorm(3, self.config)
        self.head = nnx.Linear(12, 10, rngs=nnx.Rngs(0))

    def __call__(self, images, *, key=None, train=False, tokens=True):
        x, running = self.norm(images, train=train)
        logits = self.head(x.reshape(len(x), -1))
        return Output({"logits": logits}, None, (), {}, running=below("norm", running))


def trained(sizes, devices, accumulate=1, trainable="."):
    graphdef, params = split(Small())
    optim = OptimConfig(steps=20, learning_rate=1e-2, ema_decay=0.5, weight_decay=0.5)
    task = Classification(num_classes=10, mean=(0.5,), std=(0.25,))
    setup = StepSetup(
        graphdef, task, make_optimizer(optim), learning_rate(optim), optim.ema_decay, 0, 1,
        accumulate=accumulate,
    )  # fmt: skip
    mesh = make_mesh(sizes, jax.devices()[:devices])
    init = functools.partial(init_state, setup, *split_trainable(params, trainable))
    shardings = tree_shardings(jax.eval_shape(init), mesh)
    state, step = jax.jit(init, out_shardings=shardings)(), jit_step(setup, shardings, mesh)
    for _ in range(STEPS):
        state, _ = step(state, to_global(BATCH, mesh))
    return jax.device_get(state)


def expected(images):
    """Running mean and variance after `STEPS` of the same batch, from 0 and 1, as PyTorch's."""
    pixels = (images / 255 - 0.5).reshape(-1, 3) / 0.25
    return pixels.mean(0) * (1 - LEFT), LEFT + pixels.var(0, ddof=1) * (1 - LEFT)


@pytest.mark.parametrize(
    "sizes, devices", [(MeshConfig(data=1), 1), (MeshConfig(data=4, fsdp=2), 8)]
)
def test_statistics_are_those_of_the_batch_of_all_devices(sizes, devices):
    state = trained(sizes, devices)
    for name, wanted in zip(("mean", "var"), expected(BATCH["image"]), strict=True):
        path = f"norm/running_{name}"
        np.testing.assert_allclose(state.params[path], wanted, rtol=1e-5, atol=1e-6)
        assert not np.allclose(state.ema[path], wanted)  # the average of what they were
        moments = state.opt[1][0]
        assert not np.any(moments.mu[path]) and not np.any(moments.nu[path])
    assert np.any(state.params["norm/bias"])


def test_parts_of_a_batch_are_measured_each_and_averaged():
    state = trained(MeshConfig(data=1), 1, accumulate=2)
    parts = [expected(BATCH["image"][i::2]) for i in range(2)]
    for i, name in enumerate(("mean", "var")):
        wanted = (parts[0][i] + parts[1][i]) / 2
        np.testing.assert_allclose(
            state.params[f"norm/running_{name}"], wanted, rtol=1e-5, atol=1e-6
        )


def test_frozen_statistics_stay():
    state = trained(MeshConfig(data=1), 1, trainable="^head/")
    assert not np.any(state.frozen["norm/running_mean"])
    assert set(state.params) == {"head/kernel", "head/bias"}
