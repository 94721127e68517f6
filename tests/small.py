"""A network and a run small enough for tests."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tosa_jax.config import RunConfig, default_config, make_run_config
from tosa_jax.distributed.mesh import make_mesh
from tosa_jax.models.params import Params, set_params, split
from tosa_jax.models.vit import Output, VisionTransformer
from tosa_jax.tasks import create_model
from tosa_jax.train import loop, runner
from tosa_jax.train.checkpoints import Checkpoints

SIZES = {
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "image_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
}


def small_model(seed: int = 0, **fields) -> VisionTransformer:
    """Four layers of 16 channels on 8x8 grey images: 16 patches."""
    return drawn_model("vit", seed, **(SIZES | fields))


def drawn_model(name: str, seed: int = 0, **fields) -> VisionTransformer:
    """A new model of `create_model`; its random weights are drawn once for all calls with the same arguments."""
    try:
        return set_params(*_drawn(name, seed, **fields))
    except TypeError:  # a list, say, which is no key of a cache
        return create_model(name, rngs=nnx.Rngs(seed), **fields)


@functools.lru_cache(maxsize=256)
def _drawn(name: str, seed: int, **fields) -> tuple[nnx.GraphDef, Params]:
    graphdef, params = split(create_model(name, rngs=nnx.Rngs(seed), **fields))
    traced = any(isinstance(x, jax.core.Tracer) for x in params.values())
    assert not traced, "what is kept must not be traced: make the model outside of jit"
    return graphdef, params


def forward(model: VisionTransformer, images: jax.Array, key: jax.Array | None = None) -> Output:
    """The model's output, compiled once for every model of the same configuration: eager calls take seconds."""
    return _forward(*split(model), images, key)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, params, images, key):
    return set_params(graphdef, params)(images, key=key)


def random_images(batch: int = 4, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, 8, 8, 1))


def with_noise(params: Params, seed: int = 9, scale: float = 0.1) -> Params:
    """Every parameter moved, so that nothing is zero or one by initialisation. NumPy adds: nothing is to compile."""
    keys = jax.random.split(jax.random.key(seed), len(params))
    return {
        name: jnp.asarray(
            np.asarray(x) + np.float32(scale) * np.asarray(jax.random.normal(k, x.shape))
        )
        for k, (name, x) in zip(keys, params.items(), strict=True)
    }


def die_after_saving(checkpoints: Checkpoints, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises KeyboardInterrupt right after the checkpoint of `step` is written, as if the run were killed there."""
    save = checkpoints.save

    def save_and_die(at, *args):
        save(at, *args)
        if at == step:
            checkpoints.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", save_and_die)


def trace_steps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that is trained again, to resume it say, takes the step that was traced before."""
    made, jit_step = {}, loop.jit_step

    def once(setup, shardings, mesh):
        if setup not in made:
            made[setup] = jit_step(setup, shardings, mesh)
        return made[setup]

    monkeypatch.setattr(loop, "jit_step", once)


def small_run(data_dir: str, **sections) -> RunConfig:
    """A run of a few steps of two layers on the digits; `sections` are updates, by section."""
    config = default_config()
    config.update(batch_size=16, log_steps=3)
    config.model.update(SIZES, depth=2)
    config.data.update(name="digits", data_dir=data_dir, augment="shift", in_memory=True)
    config.inputs.update(mean=(0.3,), std=(0.4,))
    config.eval.update(batch_size=120, figure_images=2)
    for name, fields in sections.items():
        if isinstance(fields, dict):
            config[name].update(fields)
        else:
            config[name] = fields
    return make_run_config(config)


@contextlib.contextmanager
def runs_on_one_device() -> Iterator[None]:
    """Runs in this context take one of the eight devices: programs for all take twice as long to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield
