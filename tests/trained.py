"""A work directory as a run leaves it, without the training."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from small import small_run

from tosa_jax.checkpoints import Checkpoints
from tosa_jax.config_json import to_json
from tosa_jax.data.class_names import write_names
from tosa_jax.models.params import split
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.steps import TrainState

CLASSES = tuple(f"digit {i}" for i in range(10))


def make_workdir(path: Path, seed: int = 3, **fields) -> VisionTransformer:
    """Configuration, class names and a checkpoint of an untrained small network, which is returned."""
    path.mkdir(parents=True, exist_ok=True)
    run = small_run("unused", model={"keep_rate": (0.5,)} | fields)
    (path / "config.json").write_text(json.dumps(to_json(run)))
    write_names(path, CLASSES)
    model = VisionTransformer(run.model, rngs=nnx.Rngs(seed))
    state = TrainState(jnp.zeros((), jnp.int32), split(model)[1], {}, {}, {}, {})
    checkpoints = Checkpoints(path / "checkpoints/finetune", "acc1")
    checkpoints.save(7, state, {"steps": 7})
    checkpoints.wait()
    checkpoints.close()
    return model


def make_pictures(folder: Path, count: int = 3, size: tuple[int, int] = (11, 9)) -> list[Path]:
    """Grey noise as PNG files, of another size than the network's."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(count)]
    for path in paths:
        Image.fromarray(noise.integers(0, 256, size[::-1], np.uint8)).save(path)
    return paths
