"""Two choices that rotary positions leave open when tokens are reduced, on small networks and without fine-tuning.

    python results/rotary_choices.py --workdirs runs/rotary_0 ... --data=DIR > results/rotary_choices.json

--workdirs are runs of one dense network with rotary positions and no learned ones, a seed each (the JSON has the
command); --data has Fashion-MNIST's gz files. Of redundancy and ToMe, at shares of the dense multiply-adds:

likeness  of keys as attention reads them, turned by their positions, or turned back ("before").
place     of a merged group: its representative's; the mean of the positions of its tokens; or the means of their
          cosines and of their sines, as this project has it, which are no rotation any more. Means are by size.

Each row has the accuracy and the cosines to the dense network's final tokens. "paired" has the differences to likeness
of turned keys with the representative's place, and what likeness alone changes with this project's place: means over
seeds and pictures, with 95 % intervals by resampling pictures.
"""

import argparse
import contextlib
import gzip
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import tosa_jax
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.models import cost
from tosa_jax.models.factory import abstract_model
from tosa_jax.models.methods import reducing, redundancy
from tosa_jax.models.params import set_params, split
from tosa_jax.models.vit_config import ViTConfig
from tosa_jax.ops.reduction import Reduction
from tosa_jax.ops.rotary import Rotary, turn
from tosa_jax.performance.comparison import closeness, contender, features, grid_tokens, solved
from tosa_jax.reporting.intervals import difference, interval

TRAINING = (
    "python -m tosa_jax.main --config=configs/fashion_mnist.py:cpu --config.data.source_dir=DIR"
    " --config.model.rope=dinov3 --config.model.pos_embed=False --config.model.plan=standard"
    " --config.model.embed_dim=48 --config.model.num_heads=3 --config.model.depth=4 --config.batch_size=64"
    " --config.eval.controls='()' --config.eval.keep_rates='()' --config.eval.figure_images=0 --config.selector.steps=0"
    " --config.finetune.epochs=0 --config.pretrain.epochs=0 --config.pretrain.steps=400"
    " --config.pretrain.warmup_epochs=0 --config.pretrain.warmup_steps=50 --config.pretrain.learning_rate=2e-3"
    " --config.pretrain.ema_decay=0.98 --config.pretrain.checkpoint_epochs=0 --config.seed=N --workdir=runs/rotary_N"
)
"""How each network was made, N its seed."""

LIKENESS = ("turned", "before")
PLACES = ("representative", "mean position", "mean cosine and sine")
BASE, OURS = (LIKENESS[0], PLACES[0]), (LIKENESS[0], PLACES[2])


def back(rotary: Rotary) -> Rotary:
    """What turns a key back. A mean of cosines and sines also shrinks it, which is undone too."""
    square = jnp.maximum(rotary.cos**2 + rotary.sin**2, 1e-6)
    return Rotary(rotary.cos / square, -rotary.sin / square)


def with_keys_before(block, state, context, report, reduce, whole=reducing.reduced_between):
    """`reduced_between`, whose report gets the keys as they were before they were turned."""

    def of_keys_before(query, key, value):
        neighbours = block.attn.rope == "eva02"
        return report(query, turn(key, back(state.rotary), neighbours), value)

    return whole(block, state, context, of_keys_before, reduce)


def of_representatives(reduction: Reduction, rotary: Rotary) -> Rotary:
    """Of each group the place of the token that represents it."""
    chosen = reduction.representatives()

    def take(values):
        values = jnp.broadcast_to(values, (chosen.shape[0], *values.shape[1:]))
        return jnp.take_along_axis(values, chosen[:, :, None], axis=1)

    return Rotary(take(rotary.cos), take(rotary.sin))


def mean_positions(base: float):
    """Of each group the mean of rows and columns, which are read from the slowest angles: these tell them."""

    def places(reduction: Reduction, rotary: Rotary) -> Rotary:
        count = rotary.cos.shape[2] // 2
        frequencies = jnp.asarray(base ** -(np.arange(count) / count), jnp.float32)
        angles = jnp.arctan2(rotary.sin, rotary.cos)[:, :, [count - 1, 2 * count - 1]]
        positions = angles / frequencies[-1]
        shape = (reduction.representatives().shape[0], *positions.shape[1:])
        means = reduction.merge(jnp.broadcast_to(positions, shape))
        turned = means[:, :, :, None] * frequencies
        turned = turned.reshape(*means.shape[:2], -1)
        return Rotary(jnp.cos(turned), jnp.sin(turned))

    return places


@contextlib.contextmanager
def choosing(likeness: str, place: str, config: ViTConfig) -> Iterator[None]:
    """Networks that are traced meanwhile make these choices."""
    with contextlib.ExitStack() as stack:
        if likeness == "before":
            for module in (reducing, redundancy):
                changed = mock.patch.object(module, "reduced_between", with_keys_before)
                stack.enter_context(changed)
        others = {PLACES[0]: of_representatives, PLACES[1]: mean_positions(config.rope_base)}
        if place in others:
            stack.enter_context(mock.patch.object(Reduction, "places", others[place]))
        yield


def pictures(folder: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first test pictures, uint8 [count 28 28 1], and their classes."""
    read = {part: gzip.decompress((folder / f"t10k-{part}-ubyte.gz").read_bytes())
            for part in ("images-idx3", "labels-idx1")}  # fmt: skip
    images = np.frombuffer(read["images-idx3"], np.uint8, offset=16).reshape(-1, 28, 28, 1)
    return images[:count], np.frombuffer(read["labels-idx1"], np.uint8, offset=8)[:count]


def forward_of(config: ViTConfig):
    """`(params, images) ->` final tokens [b n d] of a network, all in their places."""
    graphdef, _ = split(abstract_model(config))
    return jax.jit(lambda params, x: grid_tokens(set_params(graphdef, params), x, None))


def measured(predictors: list, config: ViTConfig, images: np.ndarray, classes: np.ndarray, dense):
    """Of each picture, means over the seeds: whether it is told right, and the cosines to the dense tokens.

    dense  the tokens of each seed's dense network; None: the network itself is dense.
    """
    forward, tokens, found = forward_of(config), [], []
    for i, predictor in enumerate(predictors):
        model, task = predictor.model, predictor.task
        inputs = ((images / 255 - np.array(task.mean)) / np.array(task.std)).astype(np.float32)
        tokens.append(features(forward, split(model)[1], inputs))
        logits = np.asarray(model.classify(jnp.asarray(tokens[-1])))
        near = closeness(tokens[-1], tokens[-1] if dense is None else dense[i], config)
        found.append({"accuracy": (logits.argmax(axis=1) == classes).astype(float)} | near)
    return {name: np.stack([one[name] for one in found]) for name in found[0]}, tokens


def rows_of(predictors, images, classes, methods, shares, places) -> Iterator[tuple[dict, dict]]:
    """Each row, and its values [seeds pictures] by name."""
    config = predictors[0].config
    values, dense = measured(predictors, config, images, classes, None)
    yield {"method": "dense", "share": 1.0}, values
    for method, share in itertools.product(methods, shares):
        reduced = solved(config, contender(method), share)
        for likeness, place in itertools.product(LIKENESS, places):
            row = {"method": method, "target": share, "likeness": likeness, "place": place}
            row["share"] = cost.gmacs(reduced) / cost.gmacs(config)
            with choosing(likeness, place, config):
                values, _ = measured(predictors, reduced, images, classes, dense)
            yield row, values


def paired(rows: list[tuple[dict, dict]]) -> list[dict]:
    """Differences of each row to the one with the choices of `BASE`; of likeness at this project's place, to `OURS`."""
    values_of = {(row["method"], row.get("target"), row.get("likeness"), row.get("place")): values
                 for row, values in rows}  # fmt: skip
    found = []
    for (method, target, *choices), values in values_of.items():
        rivals = [BASE] + [OURS] * (choices[1] == OURS[1])
        for rival in (rival for rival in rivals if tuple(choices) != rival):
            if (theirs := values_of.get((method, target, *rival))) is None:
                continue
            pair = {"method": method, "target": target, "choices": choices, "against": rival}
            for name, x in values.items():
                mean, bounds = difference(x.mean(axis=0), theirs[name].mean(axis=0))
                seeds = (x - theirs[name]).mean(axis=1)
                pair[name] = {"difference": mean, "interval": bounds, "seeds": seeds.tolist()}
            found.append(pair)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdirs", type=Path, nargs="+", required=True)
    parser.add_argument("--data", type=Path, required=True, help="Fashion-MNIST's gz files")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--methods", nargs="+", default=["redundancy", "tome"])
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--target", type=float, nargs="+", default=[0.75, 0.5])
    args = parser.parse_args()
    images, classes = pictures(args.data, args.images)
    predictors = [tosa_jax.load(x, on_message=lambda line: None) for x in args.workdirs]
    rows = []
    for row, values in rows_of(predictors, images, classes, args.methods, args.target, args.places):
        for name, x in values.items():
            row[name] = {"mean": float(x.mean()), "interval": interval(x.mean(axis=0))}
        rows.append((row, values))
        print(row, file=sys.stderr, flush=True)
    config = predictors[0].config
    json.dump({
        "command": "python results/rotary_choices.py --workdirs runs/rotary_0 runs/rotary_1 runs/rotary_2 --data=DIR "
        f"--images={args.images}",
        "training": TRAINING,
        "data": f"the first {args.images} test pictures of Fashion-MNIST; {len(predictors)} seeds",
        "network": {name: getattr(config, name) for name in ("embed_dim", "depth", "num_heads", "patch_size", "rope")},
        "device": describe_device(), "versions": versions(),
        "rows": [row for row, _ in rows], "paired": paired(rows),
    }, sys.stdout, indent=1)  # fmt: skip
    print()


if __name__ == "__main__":
    main()
