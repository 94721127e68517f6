"""Labels written as text beside a plain head of sigmoids: the same backbone, canvases, order of examples and updates.

    python results/next_token.py --seeds=3 --source_dir=DIR

DIR holds Fashion-MNIST's four gz files. Both are the recipe `configs/next_token.py` (`:cpu` and `:cpu_head`) without
its selective stages: 1 to 4 items on a canvas, 2000 test canvases. Scores are means over canvases
(`tosa_jax/tasks/label_sets.py`). `majority` predicts the same labels for every canvas, the most frequent ones of the
training split, as many as have the best F1 there. Intervals are 95 % over seeds (Student's t), `paired` those of the
difference, text minus head, at equal seeds. `--out` is written anew after each seed.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "configs"))
import next_token as recipe

from tosa_jax.config import make_run_config
from tosa_jax.data.pipeline import DataConfig, open_dataset
from tosa_jax.distributed.devices import describe_device, versions
from tosa_jax.distributed.preemption import StopRequest
from tosa_jax.reporting.intervals import seeds_record
from tosa_jax.tasks.label_sets import set_scores
from tosa_jax.train.metric_writer import MetricWriter
from tosa_jax.train.runner import Runner
from tosa_jax.train.stages import plan_stages

VARIANTS = {"next_token": "cpu", "head": "cpu_head"}


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
        for name, variant in VARIANTS.items():
            runs.append({"network": name, "seed": seed} | trained(variant, seed, args))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
        args.out.write_text(json.dumps(record(runs, args), indent=1) + "\n")


def trained(variant: str, seed: int, args: argparse.Namespace) -> dict:
    """The scores of one run, and what it took."""
    config = recipe.get_config(variant)
    config.seed = seed
    config.selector.steps = config.finetune.steps = 0
    config.pretrain.update(steps=args.steps or config.pretrain.steps, checkpoint_epochs=0.0)
    config.data.source_dir = args.source_dir
    config.data.data_dir = args.data_dir or config.data.data_dir
    run = make_run_config(config)
    (stage,), _ = plan_stages(run)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder, MetricWriter(Path(folder)) as writer:
        runner = Runner(run, Path(folder), StopRequest())
        runner.train(stage, writer)
    facts = runner.facts[stage.name]
    return {
        "steps": facts["steps"],
        "cpu_seconds": round(time.process_time() - start, 1),
        **facts["after"],
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
    scores = ("f1", "recall", "precision", "r_precision")
    flags = {"seeds": args.seeds} | ({"steps": args.steps} if args.steps else {})
    return {
        "command": "python results/next_token.py "
        + " ".join(f"--{name}={value}" for name, value in flags.items()),
        "device": describe_device(),
        "versions": versions(),
        "majority": majority(args),
        "summary": {
            name: {score: seeds_record([row[score] for row in rows]) for score in scores}
            for name, rows in by_name.items()
        },
        "paired": {
            score: seeds_record(
                [a[score] - b[score] for a, b in zip(*by_name.values(), strict=True)]
            )
            for score in scores
        },
        "runs": runs,
    }


if __name__ == "__main__":
    main()
