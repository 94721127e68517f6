"""Depth with frozen backbones: every method's decoder is trained on its own tokens, which are computed once.

    python results/frozen_rooms.py --config=configs/frozen_rooms.py --config.init_from=FILE \
        --methods redundancy tome evit --target .75 .65 --out=results

As `tosa_jax.compare` on this recipe, but quicker: a frozen backbone gives the same tokens in every epoch, so that they
are computed once for each method and serve all seeds. Plans are those of untrained methods; what a method adds to the
network is as it is before training. A seed decides the decoder's first parameters, which are the same for all methods,
and the order of the images. What random selection draws for an image stays. It writes compare_frozen_rooms.json after
each row, and goes on from there; then the table and the plot.
"""

import argparse
import functools
import json
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tosa_jax.cli import flags
from tosa_jax.compare import without_path
from tosa_jax.config import RunConfig, make_run_config
from tosa_jax.data.pipeline import open_dataset
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.errors import ConfigError
from tosa_jax.models import cost
from tosa_jax.models.factory import build, control_config
from tosa_jax.models.method import DENSE
from tosa_jax.models.optim import make_optimizer
from tosa_jax.models.params import set_params, split
from tosa_jax.models.vit import Output
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.models.weights.load import load_pretrained
from tosa_jax.paths import write_atomically
from tosa_jax.performance.comparison import contender, solved
from tosa_jax.reporting import comparison as tables
from tosa_jax.tasks import TASKS
from tosa_jax.tasks.depth.network import DECODERS

NAME = "compare_frozen_rooms"


class Rooms:
    """The recipe's data, and decoders on the tokens of any network."""

    def __init__(self, run: RunConfig, seeds: int) -> None:
        self.run, self.seeds = run, seeds
        self.task = TASKS[run.task].from_run(run, run.finetune)
        self.dense = control_config(run.model, DENSE)
        self.images, self.depth = {}, {}
        for split_name in (run.data.train_split, run.data.eval_split):
            batches = list(open_dataset(run.data).eval_batches(batch_size=16, split=split_name))
            seen = np.concatenate([x["mask"] for x in batches]) > 0
            self.images[split_name] = np.concatenate([x["image"] for x in batches])[seen]
            self.depth[split_name] = np.concatenate([x["depth"] for x in batches])[seen]

    def scores(self, network: ViTConfig) -> list[dict[str, float]]:
        """The errors that a decoder on this network's tokens reaches, a mapping for each seed."""
        model = build(network, rngs=nnx.Rngs(0))
        load_pretrained(model, self.run.init_from, on_message=lambda line: None)
        graphdef, params = split(model)

        @jax.jit
        def encode(params, images, key):
            model = set_params(graphdef, params)
            tokens = model.embed(self.task.inputs(images))
            state = model.layers(tokens, key=key, train=False, grid=network.grid)
            return [model.norm(state.intermediate[i]) for i in network.intermediate_layers]

        features = {}
        for name, images in self.images.items():
            parts = [
                jax.device_get(encode(params, images[i : i + 16], jax.random.key(i)))
                for i in range(0, len(images), 16)
            ]
            features[name] = [np.concatenate(tap) for tap in zip(*parts, strict=True)]
        return [self._decoded(seed, features) for seed in range(self.seeds)]

    def _decoded(self, seed: int, features: dict[str, list[np.ndarray]]) -> dict[str, float]:
        """Trains a decoder as the recipe fine-tunes, and scores it."""
        run, train, test = self.run, self.run.data.train_split, self.run.data.eval_split
        optim, step, score = self._programs
        params = split(DECODERS[self.dense.decoder](self.dense, rngs=nnx.Rngs(seed)))[1]
        state = optim.init(params)
        rng, order = np.random.default_rng(seed), np.array([], int)
        for _ in range(run.finetune.duration("", len(self.depth[train]) // run.batch_size)):
            if len(order) < run.batch_size:
                order = np.append(order, rng.permutation(len(self.depth[train])))
            rows, order = order[: run.batch_size], order[run.batch_size :]
            taps = [x[rows] for x in features[train]]
            params, state = step(params, state, taps, self.depth[train][rows])
        errors = jax.device_get(score(params, features[test], self.depth[test]))
        return {name: float(values.mean()) for name, values in errors.items()}

    @functools.cached_property
    def _programs(self) -> tuple[optax.GradientTransformation, Any, Any]:
        """Optimizer, training step and errors: the same for all networks."""
        run, dense = self.run, self.dense
        per_epoch = len(self.depth[run.data.train_split]) // run.batch_size
        optim = make_optimizer(run.finetune.optim(per_epoch, run.batch_size))
        graphdef = split(DECODERS[dense.decoder](dense, rngs=nnx.Rngs(0)))[0]

        def decoded(params, taps) -> Output:
            depth = set_params(graphdef, params)(taps, dense.grid, dense.image_shape)
            return Output({"depth": depth}, taps[-1], (), {})

        @jax.jit
        def step(params, state, taps, depth):
            batch = {"depth": depth, "weight": jnp.ones(len(depth))}

            def loss(params):
                return self.task.loss(decoded(params, taps), batch).mean()

            updates, state = optim.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        @jax.jit
        def score(params, taps, depth):
            return self.task.metrics(decoded(params, taps), {"depth": depth})

        return optim, step, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--target", nargs="+", type=float, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results"))
    args, recipe = parser.parse_known_args()
    rooms = Rooms(make_run_config(flags.parse(__doc__, recipe)[0]), args.seeds)
    path = args.out / f"{NAME}.json"
    record = opened(rooms, recipe, path)
    for target in args.target:
        for row in map(contender, args.methods):
            if (row.name, target) in {(x["name"], x["target"]) for x in record["rows"]}:
                continue
            others = [
                x for x in record["left_out"] if (x["name"], x["target"]) != (row.name, target)
            ]
            record["left_out"] = others
            try:
                network = solved(rooms.dense, row, target)
            except ConfigError as error:
                others.append({"name": row.name, "target": target, "why": str(error)})
                continue
            gmacs, scores = cost.gmacs(network), rooms.scores(network)
            record["rows"].append({
                "name": row.name, "method": row.method, "target": target, "gmacs": gmacs,
                "share": gmacs / record["dense_gmacs"], "metrics": scores,
            })  # fmt: skip
            write(record, path, args.seeds)
            print(target, row.name, *(x[record["metric"]] for x in scores), flush=True)
    write(record, path, args.seeds)
    write_atomically(path.with_suffix(".md"), tables.markdown(NAME, record).encode())
    write_atomically(path.with_suffix(".png"), tables.plot(record))


def opened(rooms: Rooms, recipe: list[str], path: Path) -> dict[str, Any]:
    """The record so far, or a new one with the dense network's errors."""
    if path.exists():
        return json.loads(path.read_text())
    task, split_name = rooms.task, rooms.run.data.eval_split
    dense = {"split": split_name, "count": len(rooms.depth[split_name]), "pretrained": []}
    return {
        "command": "", "device": describe_device(), "versions": versions(),
        "recipe": [without_path(word) for word in recipe], "metric": task.best_metric,
        "lower_is_better": task.lower_is_better, "trainable": rooms.run.finetune.trainable,
        "dense_gmacs": cost.gmacs(rooms.dense), "left_out": [], "rows": [],
        "dense": dense | {"finetuned": rooms.scores(rooms.dense)},
    }  # fmt: skip


def write(record: dict[str, Any], path: Path, seeds: int) -> None:
    """The record with a command that makes all of it."""
    done = record["rows"] + record["left_out"]
    names = dict.fromkeys(x["name"] for x in done)
    targets = sorted({x["target"] for x in done}, reverse=True)
    words = [
        *record["recipe"],
        "--methods",
        *names,
        "--target",
        *map(str, targets),
        f"--seeds={seeds}",
    ]
    record["command"] = f"python results/frozen_rooms.py {shlex.join(words)}"
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
