"""Scores the constant that every depth network must beat: the training set's mean depth map, for every test image.

    python results/mean_depth_map.py --config=configs/rooms.py [--config.FIELD=VALUE ...] > runs/mean_depth_map.json

Prints a record as the rows of `report.json` are, for the `--baseline` of `results/collect.py`.
"""

import contextlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from tosa_jax.cli.flags import parse
from tosa_jax.config import StageConfig, make_run_config
from tosa_jax.data.pipeline import open_dataset
from tosa_jax.models.vit import Output
from tosa_jax.tasks import TASKS, metrics


def score_mean_map(argv: list[str]) -> dict:
    """The record for the recipe of a command line."""
    config, _ = parse(__doc__, argv)
    run = make_run_config(config)
    task = TASKS[run.task].from_run(run, StageConfig())
    size = run.eval.batch_size
    total = count = 0
    dataset = open_dataset(run.data)
    for batch in dataset.eval_batches(batch_size=size, split=run.data.train_split):
        measured = batch["depth"] > 0
        total = total + np.where(measured, batch["depth"], 0).sum(axis=0, dtype=np.float64)
        count = count + measured.sum(axis=0)
    mean = jnp.asarray(total / np.maximum(count, 1), jnp.float32)

    @jax.jit
    def score(batch):
        depth = jnp.broadcast_to(mean[None], batch["depth"].shape)
        out = Output({"depth": depth}, jnp.zeros((len(depth), 1, 1)), (), {})
        return metrics.totals(task.metrics(out, batch), batch["mask"])

    sums, seen = None, 0
    for batch in dataset.eval_batches(batch_size=size):
        task.check_batch(batch, seen)
        seen += int(batch["mask"].sum())
        sums = metrics.add(sums, score(batch))
    record = {"name": "mean_depth_map", "split": run.data.eval_split, "count": seen}
    return record | {"metrics": metrics.means(jax.device_get(sums))}


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # preparing a set talks
        record = score_mean_map(sys.argv[1:])
    json.dump(record, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
