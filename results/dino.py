"""What pretraining without labels is worth: DINO and DenseDINO beside the random backbone that they start from.

    python results/dino.py --seeds=3 --runs=DIR [--out=results/dino.json]

For each seed: accuracy of nearest neighbours and of a linear classifier on frozen features of the digits' test split,
and how well patches find the same place in another crop of the image. For that, each test image has two crops of at
least half of it; at four points that both show, the token there (bilinear between patches) looks for the patch of the
other crop with the largest cosine. `found` is the share of points whose patch lies within one patch's side of the true
place, `distance` the mean distance in sides of a crop. `references` is the same with reference tokens in both crops,
which every backbone can have: a point looks for its own among the sixteen points of four images, chance is 1/16.

All networks of a seed start from the same backbone. `pixels` are the images themselves. Each run is a file in DIR: a
study that was stopped goes on, and `--only=SEED` lets several processes share the work. Intervals are 95 % over seeds
(Student's t), `paired` those of differences at equal seeds.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1] / "configs"))
import dino as recipe

from tosa_jax.config import make_run_config
from tosa_jax.data.builders.digits import load_digits_split
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.distributed.preemption import StopRequest
from tosa_jax.models.factory import build, structure
from tosa_jax.models.params import get_params, set_params
from tosa_jax.reporting.intervals import seeds_record
from tosa_jax.tasks.dino.crops import cut, draw_boxes, seen_in, shared_points
from tosa_jax.tasks.dino.network import place_weights
from tosa_jax.tasks.dino.scores import nearest_neighbours, ridge_classes
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.runner import Runner
from tosa_jax.train.stages import plan_stages

POINTS, GROUP, DRAWS = 4, 4, 3
"""Points of an image, images whose points a reference token chooses among, and draws of crops of each image."""

NETWORKS = ("random", "dino", "dense_dino")
SCORES = ("knn", "linear", "found", "distance", "references")


def correspondence(config, params, images) -> dict[str, float]:
    """`found` and `distance` of patches, and `references` of reference tokens."""
    size = config.image_shape
    graphdef = structure(config).graphdef
    grid = config.grid
    centres = np.stack(np.divmod(np.arange(grid[0] * grid[1]), grid[1]), axis=1) + 0.5
    centres = jnp.asarray(centres / np.asarray(grid), jnp.float32)

    @jax.jit
    def compare(params, images, key):
        model = set_params(graphdef, params)
        keys = jax.random.split(key, 3)
        a = draw_boxes(keys[0], (len(images),), (0.5, 1.0))
        b = draw_boxes(keys[1], (len(images),), (0.5, 1.0), (a,), 0.25)
        flips = jnp.zeros(len(images))
        points, _ = shared_points(keys[2], POINTS, a, b)
        at, goal = seen_in(points, a, flips), seen_in(points, b, flips)
        first, second = (
            model(cut(images, box, size, flips), place) for box, place in ((a, at), (b, goal))
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
        mine, theirs = (
            unit(out.predictions["reference_features"]).reshape(
                len(images) // GROUP, GROUP * POINTS, -1
            )
            for out in (first, second)
        )
        best = jnp.einsum("gid,gjd->gij", mine, theirs).argmax(axis=2)
        found["references"] = best == jnp.arange(GROUP * POINTS)[None]
        return {name: x.mean() for name, x in found.items()}

    draws = [compare(params, images, jax.random.key(i)) for i in range(DRAWS)]
    return {name: float(np.mean([x[name] for x in draws])) for name in draws[0]}


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def runner_of(network: str, seed: int, args: argparse.Namespace, folder: str) -> Runner:
    config = recipe.get_config("" if network == "dino" else "dense")
    config.seed = seed
    if args.data_dir:
        config.data.data_dir = args.data_dir
    return Runner(make_run_config(config), Path(folder), StopRequest())


def one_run(network: str, seed: int, args: argparse.Namespace) -> dict:
    """The scores of one backbone, and what it took."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder, MetricWriter(Path(folder)) as writer:
        dense = runner_of("dense_dino", seed, args, folder)
        config = dense.run.model
        params = get_params(build(config, rngs=nnx.Rngs(params=jax.random.key(seed))))
        facts = {}
        if network != "random":
            runner = runner_of(network, seed, args, folder)
            (stage,), _ = plan_stages(runner.run)
            runner.train(stage, writer)
            # Plain DINO's network has no head for reference tokens; their features need none.
            params |= runner.params[stage.name]
            facts = {"steps": runner.facts[stage.name]["steps"]}
        evaluator = dense.builder.evaluator(config, dense.builder.task)
        metrics, _ = evaluator(params)
        images = np.concatenate([batch["image"] for batch, _ in evaluator.outputs(params, "eval")])
        normal = dense.builder.task.inputs(jnp.asarray(images))
        found = metrics | correspondence(config, params, normal)
    seconds = {"cpu_seconds": round(time.process_time() - start, 1)}
    return {"network": network, "seed": seed} | facts | seconds | found


def pixels() -> dict[str, float]:
    """Scores of the images themselves as features."""
    (train, known), (test, wanted) = (
        (images.reshape(len(images), -1).astype(np.float32), labels)
        for images, labels in map(load_digits_split, ("train", "test"))
    )
    return {
        "knn": float((nearest_neighbours(train, known, test) == wanted).mean()),
        "linear": float((ridge_classes(train, known, test) == wanted).mean()),
    }


def record(runs: list[dict], args: argparse.Namespace) -> dict:
    by_name = {name: [row for row in runs if row["network"] == name] for name in NETWORKS}

    def paired(ours: str, theirs: str) -> dict:
        pairs = list(zip(by_name[ours], by_name[theirs], strict=True))
        return {score: seeds_record([a[score] - b[score] for a, b in pairs]) for score in SCORES}

    return {
        "command": f"python results/dino.py --seeds={args.seeds} --runs=DIR",
        "device": describe_device(),
        "versions": versions(),
        "pixels": pixels(),
        "summary": {
            name: {score: seeds_record([row[score] for row in rows]) for score in SCORES}
            for name, rows in by_name.items()
        },
        "paired": {
            f"{ours} - {theirs}": paired(ours, theirs)
            for ours, theirs in (
                ("dino", "random"), ("dense_dino", "random"), ("dense_dino", "dino"),
            )
        },
        "runs": runs,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", type=int, help="run this seed alone, and write no record")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--out", type=Path, default=Path("results/dino.json"))
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in range(args.seeds) if args.only is None else (args.only,):
        for network in NETWORKS:
            path = args.runs / f"{network}_{seed}.json"
            if not path.exists():
                found = json.dumps(one_run(network, seed, args))
                part = path.with_suffix(".part")
                part.write_text(found)
                part.replace(path)
                print(found, file=sys.stderr, flush=True)
            runs.append(json.loads(path.read_text()))
    if args.only is None:
        args.out.write_text(json.dumps(record(runs, args), indent=1) + "\n")


if __name__ == "__main__":
    main()
