"""Labels written as text beside a plain head of sigmoids: the same backbone, canvases, order of examples and updates.

    python results/next_token.py --seeds=6 --source_dir=DIR

DIR holds Fashion-MNIST's four gz files. Both are the recipe `configs/next_token.py` (`:cpu` and `:cpu_head`) without
its selective stages: 1 to 4 items on a canvas, 2000 test canvases. The last tenth of the training canvases is held out;
on it each run chooses the number that says how many labels it predicts (`top_p`, `threshold`), by F1. Scores are means
over test canvases (`tosa_jax/tasks/label_sets.py`); `untuned` has those of the recipe's own number. `majority`
predicts the same labels for every canvas, the most frequent ones of the training split, as many as have the best F1
there. Intervals are 95 % over seeds (Student's t), `paired` those of the difference, text minus head, at equal seeds.
`--out` is written anew after each seed.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "configs"))
import next_token as recipe

from tosa_jax.config import make_run_config
from tosa_jax.data.pipeline import DataConfig, open_dataset
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.distributed.preemption import StopRequest
from tosa_jax.models.factory import structure
from tosa_jax.reporting.intervals import seeds_record
from tosa_jax.tasks.label_sets import set_scores
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.runner import Runner
from tosa_jax.train.stages import plan_stages

VARIANTS = {"next_token": "cpu", "head": "cpu_head"}
CHOICES = {"next_token": "top_p", "head": "threshold"}
GRID = [round(0.05 * i, 2) for i in range(2, 20)]
TRAINED, HELD_OUT, TEST = "train[:90%]", "train[90%:]", "test"
SCORES = ("f1", "recall", "precision", "r_precision")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="updates; 0: the recipe's")
    parser.add_argument("--source_dir", required=True)
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--out", type=Path, default=Path("results/next_token.json"))
    args = parser.parse_args()
    runs = []
    for seed in range(args.seeds):
        for name in VARIANTS:
            runs.append({"network": name, "seed": seed} | trained(name, seed, args))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
        args.out.write_text(json.dumps(record(runs, args), indent=1) + "\n")


def trained(name: str, seed: int, args: argparse.Namespace) -> dict:
    """The scores of one run, and what it took."""
    config = recipe.get_config(VARIANTS[name])
    config.seed = seed
    config.selector.steps = config.finetune.steps = 0
    config.pretrain.update(steps=args.steps or config.pretrain.steps, checkpoint_epochs=0.0)
    config.data.update(source_dir=args.source_dir, train_split=TRAINED, eval_split=HELD_OUT)
    config.data.data_dir = args.data_dir or config.data.data_dir
    run = make_run_config(config)
    (stage,), _ = plan_stages(run)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder, MetricWriter(Path(folder)) as writer:
        runner = Runner(run, Path(folder), StopRequest())
        runner.train(stage, writer)
    seconds = round(time.process_time() - start, 1)
    evaluator = runner.builder.evaluator(stage.model, runner.builder.task)
    params = structure(stage.model).select(runner.params[stage.name])
    task, predicted = evaluator.task, {}
    for split in (HELD_OUT, TEST):
        data = dataclasses.replace(run.data, eval_split=split)
        parts = list(dataclasses.replace(evaluator, data=data).outputs(params, "eval"))
        predicted[split] = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)

    def scores(split: str, **choice: float) -> dict[str, float]:
        chosen = dataclasses.replace(task, choices=dataclasses.replace(task.choices, **choice))
        batch, out = predicted[split]
        found = chosen.metrics(out, batch)
        return {score: float(found[score].mean()) for score in SCORES}

    field = CHOICES[name]
    best = max(GRID, key=lambda value: scores(HELD_OUT, **{field: value})["f1"])
    return {
        "steps": runner.facts[stage.name]["steps"],
        "cpu_seconds": seconds,
        field: best,
        **scores(TEST, **{field: best}),
        "untuned": scores(TEST),
    }


def majority(args: argparse.Namespace) -> dict:
    """The scores of the most frequent labels, of which there are as many as have the best F1 in training."""
    config = recipe.get_config("cpu")
    fields = {"source_dir": args.source_dir, "image_size": 56, "channels": 1}
    fields |= {"data_dir": args.data_dir} if args.data_dir else {}
    dataset = open_dataset(DataConfig(name=config.data.name, **fields))
    known, wanted = (
        np.concatenate(
            [x["labels"][x["mask"] > 0] for x in dataset.eval_batches(batch_size=500, split=split)]
        )
        for split in ("train", "test")
    )
    place = np.argsort(np.argsort(-known.sum(axis=0), kind="stable"))
    scores = [
        {
            name: float(values.mean())
            for name, values in set_scores(
                jnp.asarray(labels > 0),
                jnp.broadcast_to(place < count, labels.shape),
                jnp.broadcast_to(place, labels.shape),
                jnp.asarray(labels),
            ).items()
        }
        for labels in (known, wanted)
        for count in range(1, 11)
    ]
    count = int(np.argmax([row["f1"] for row in scores[:10]]))
    return {"labels": [recipe.LABELS[i] for i in np.argsort(place)[: count + 1]]} | scores[
        10 + count
    ]


def record(runs: list[dict], args: argparse.Namespace) -> dict:
    by_name = {name: [row for row in runs if row["network"] == name] for name in VARIANTS}
    flags = {"seeds": args.seeds} | ({"steps": args.steps} if args.steps else {})
    return {
        "command": "python results/next_token.py "
        + " ".join(f"--{name}={value}" for name, value in flags.items()),
        "device": describe_device(),
        "versions": versions(),
        "majority": majority(args),
        "summary": {
            name: {score: seeds_record([row[score] for row in rows]) for score in SCORES}
            for name, rows in by_name.items()
        },
        "paired": {
            score: seeds_record(
                [a[score] - b[score] for a, b in zip(*by_name.values(), strict=True)]
            )
            for score in SCORES
        },
        "runs": runs,
    }


if __name__ == "__main__":
    main()
