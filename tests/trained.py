"""A work directory as a run leaves it, without the training."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from small import SIZES, small_run

from tosa_jax.config import RunConfig, default_config, make_run_config, to_json
from tosa_jax.data.class_names import write_names
from tosa_jax.models.factory import build
from tosa_jax.models.params import split
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.tasks import TASKS
from tosa_jax.train.checkpoints import Checkpoints
from tosa_jax.train.step import TrainState, saved_tree

CLASSES = tuple(f"digit {i}" for i in range(10))

DEPTH_SIZES = {
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "image_size": (24, 40),
    "patch_size": 8,
    "decoder_dim": 4,
}


def make_workdir(path: Path, seed: int = 3, **fields) -> VisionTransformer:
    """Configuration, class names and a checkpoint of an untrained small network, which is returned."""
    run = small_run("unused", model=SIZES | {"keep_rate": (0.5,)} | fields)
    return leave_run(path, run, CLASSES, build(run.model, rngs=nnx.Rngs(seed)))


def make_depth_workdir(path: Path, seed: int = 3, flip_average: bool = False, **fields):
    """The same of a depth network for 24x40 pixels, whose prediction differs from pixel to pixel."""
    config = default_config(task="depth")
    config.model.update(DEPTH_SIZES | fields)
    config.data.update(name="rooms/24x40-8-4", data_dir="unused", eval_split="validation")
    config.inputs.update(mean=(0.4,), std=(0.3,))
    config.task.update(flip_average=flip_average)
    run = make_run_config(config)
    model = build(run.model, rngs=nnx.Rngs(seed))
    kernel = model.decoder.out.kernel
    kernel[...] = jax.random.normal(jax.random.key(seed), kernel.shape)
    return leave_run(path, run, (), model)


def leave_run(
    path: Path, run: RunConfig, class_names: tuple[str, ...], model: VisionTransformer
) -> VisionTransformer:
    """Writes the configuration, class names and a checkpoint of `model`, which is returned."""
    write_run(path, run, class_names)
    state = TrainState(jnp.zeros((), jnp.int32), split(model)[1], {}, {}, {}, {})
    checkpoints = Checkpoints(path / "checkpoints/finetune", TASKS[run.task].best_metric)
    checkpoints.save(7, saved_tree(state), {"steps": 7})
    checkpoints.wait()
    checkpoints.close()
    return model


def write_run(path: Path, run: RunConfig, class_names: tuple[str, ...]) -> None:
    """Writes the configuration and class names alone."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(to_json(run)))
    write_names(path, class_names)


def make_pictures(folder: Path, count: int = 3, size: tuple[int, int] = (11, 9)) -> list[Path]:
    """Grey noise as PNG files, of another size than the network's."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(count)]
    for path in paths:
        Image.fromarray(noise.integers(0, 256, size[::-1], np.uint8)).save(path)
    return paths
