"""What pretraining without labels is worth: DINO and DenseDINO beside the random backbone that they start from.

    python results/dino.py [--seeds=3] [--steps=600] --data_dir=DIR > results/dino.json

For each seed: accuracy of nearest neighbours and of a linear classifier on frozen features of the digits' test split,
and how well patches find the same place in another crop of the image. For that, each test image has two crops of at
least half of it; at four points that both show, the token there (bilinear between patches) looks for the patch of the
other crop with the largest cosine. `found` is the share of points whose patch lies within one patch's side of the true
place, `distance` the mean distance in sides of a crop. `references` is the same with reference tokens in both crops: a
point looks for its own among the sixteen points of four images, chance is 1/16.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1] / "configs"))
import dino as recipe

from tosa_jax.config import make_run_config
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.distributed.preemption import StopRequest
from tosa_jax.models.factory import build, structure
from tosa_jax.models.params import get_params, set_params
from tosa_jax.tasks.dino.crops import cut, draw_boxes, seen_in, shared_points
from tosa_jax.tasks.dino.network import place_weights
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.runner import Runner
from tosa_jax.train.stages import plan_stages

POINTS, GROUP, DRAWS = 4, 4, 3
"""Points of an image, images whose points a reference token chooses among, and draws of crops of each image."""


def correspondence(config, params, images) -> dict[str, float]:
    """`found` and `distance` of patches, and `references` where the network has reference tokens."""
    size = config.image_shape
    graphdef = structure(config).graphdef
    grid = config.grid
    centres = np.stack(np.divmod(np.arange(grid[0] * grid[1]), grid[1]), axis=1) + 0.5
    centres = jnp.asarray(centres / np.asarray(grid), jnp.float32)

    @jax.jit
    def compare(params, images, key):
        model = set_params(graphdef, params)
        keys = jax.random.split(key, 3)
        a = draw_boxes(keys[0], len(images), (0.5, 1.0))
        b = draw_boxes(keys[1], len(images), (0.5, 1.0), (a,), 0.25)
        flips = jnp.zeros(len(images))
        points, _ = shared_points(keys[2], POINTS, a, b)
        at, goal = seen_in(points, a, flips), seen_in(points, b, flips)
        refers = config.reference_points > 0
        first, second = (
            model(cut(images, box, size, flips), place if refers else None)
            for box, place in ((a, at), (b, goal))
        )
        prefix = config.num_prefix_tokens
        weights = place_weights(at, grid)
        queries = unit(jnp.einsum("brn,bnd->brd", weights, first.tokens[:, prefix:]))
        cosines = jnp.einsum("brd,bnd->brn", queries, unit(second.tokens[:, prefix:]))
        apart = jnp.abs(centres[cosines.argmax(axis=2)] - goal)
        found = {
            "found": (apart * jnp.asarray(grid)[None, None]).max(axis=2) <= 1,
            "distance": jnp.linalg.norm(apart, axis=2),
        }
        if refers:
            x, y = (
                unit(out.predictions["reference_features"]).reshape(
                    len(images) // GROUP, GROUP * POINTS, -1
                )
                for out in (first, second)
            )
            best = jnp.einsum("gid,gjd->gij", x, y).argmax(axis=2)
            found["references"] = best == jnp.arange(GROUP * POINTS)[None]
        return {name: x.mean() for name, x in found.items()}

    draws = [compare(params, images, jax.random.key(i)) for i in range(DRAWS)]
    return {name: float(np.mean([x[name] for x in draws])) for name in draws[0]}


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def scores(runner: Runner, model, params) -> dict[str, float]:
    """All scores of one backbone."""
    evaluator = runner.builder.evaluator(model, runner.builder.task)
    metrics, _ = evaluator(params)
    images = np.concatenate([batch["image"] for batch, _ in evaluator.outputs(params, "eval")])
    normal = runner.builder.task.inputs(jnp.asarray(images))
    return metrics | correspondence(model, params, normal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--data_dir", default="")
    args = parser.parse_args()
    records = []
    for seed in range(args.seeds):
        for name in ("dino", "dense_dino"):
            config = recipe.get_config("dense" if name == "dense_dino" else "")
            config.seed = seed
            config.pretrain.steps = args.steps
            if args.data_dir:
                config.data.data_dir = args.data_dir
            run = make_run_config(config)
            (stage,), _ = plan_stages(run)
            with tempfile.TemporaryDirectory() as folder, MetricWriter(Path(folder)) as writer:
                runner = Runner(run, Path(folder), StopRequest())
                random = get_params(build(stage.model, rngs=nnx.Rngs(params=jax.random.key(seed))))
                found = scores(runner, stage.model, random)
                records.append({"seed": seed, "network": f"random_{name}"} | found)
                runner.train(stage, writer)
                found = scores(runner, stage.model, runner.params[stage.name])
                seconds = runner.facts[stage.name].get("seconds")
                records.append({"seed": seed, "network": name, "seconds": seconds} | found)
            print(json.dumps(records[-2:]), file=sys.stderr, flush=True)
    table = {}
    for name in dict.fromkeys(record["network"] for record in records):
        rows = [record for record in records if record["network"] == name]
        table[name] = {
            metric: {
                "mean": float(np.mean([row[metric] for row in rows])),
                "std": float(np.std([row[metric] for row in rows], ddof=1))
                if len(rows) > 1
                else None,
            }
            for metric in rows[0]
            if metric not in ("seed", "network", "seconds")
        }
    record = {
        "command": "python results/dino.py "
        + " ".join(f"--{name}={value}" for name, value in vars(args).items() if name != "data_dir"),
        "device": describe_device(),
        "versions": versions(),
        "summary": table,
        "runs": records,
    }
    json.dump(record, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
