"""Exact evaluation: every example of a split is scored once, whatever the batch size and the number of devices."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tosa_jax.data.pipeline import DataConfig, open_dataset
from tosa_jax.distributed.memory import check_fits
from tosa_jax.distributed.mesh import (
    kernels_over,
    process_rows,
    replicated,
    to_global,
    tree_shardings,
)
from tosa_jax.distributed.timing import interleaved_seconds
from tosa_jax.models.factory import with_image_size
from tosa_jax.models.params import Params, set_params
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.tasks.metrics import add, means
from tosa_jax.tasks.task import Batch, HostBatch, Task
from tosa_jax.train.reading import reading
from tosa_jax.train.step import eval_step, example_keys


@dataclass(frozen=True)
class Evaluator:
    """Scores parameters of one model on a split.

    graphdef    of the model (`models.factory.structure`).
    task        says what is predicted and how it is scored.
    batch_size  global; the last batch is filled up, and what fills it does not count.
    seed        of random selections.
    """

    graphdef: nnx.GraphDef[VisionTransformer]
    task: Task
    data: DataConfig
    mesh: Mesh
    batch_size: int
    seed: int = 0

    @functools.cached_property
    def step(self) -> jax.stages.Wrapped:
        """The jitted `eval_step`: (params, batch, number of its first example) -> totals."""
        step = functools.partial(
            eval_step, graphdef=self.graphdef, task=self.task, seed=self.seed, mesh=self.mesh
        )
        return jax.jit(step, out_shardings=replicated(self.mesh))

    def check(self, params: Params, batch: Batch | None = None) -> None:
        """Raises DeviceError, with both numbers, if the step on a global batch (None: the first) does not fit."""
        batch = next(self.batches()) if batch is None else batch
        check_fits(
            # Kept by JAX: the call of the step that follows compiles nothing.
            self.step.lower(params, batch, np.int32(0)).compile(),
            f"an evaluation step of eval.batch_size={self.batch_size}",
            "set --config.eval.batch_size lower, or --config.model.map_chunk=64",
        )

    def batches(self, split: str = "eval") -> Iterator[Batch]:
        """Global batches of the split "eval" or "train".

        Raises DataError at an example that cannot be scored; Stopped: a signal asks to stop.
        """
        index, count = process_rows(self.mesh)
        host = open_dataset(self.data).eval_batches(
            batch_size=self.batch_size,
            process_index=index,
            process_count=count,
            split=None if split == "eval" else self.data.train_split,
        )
        with reading(host, f"evaluation of {split}") as reader:
            for number, batch in enumerate(reader):
                first = number * self.batch_size + index * (self.batch_size // count)
                if split == "eval":
                    self.task.check_batch(batch, first)
                yield to_global(batch, self.mesh)

    def outputs(self, params: Params, split: str) -> Iterator[tuple[HostBatch, Any]]:
        """Batches of a split, "train" or "eval", and what the model predicts for them, on every host, unpadded."""
        for number, batch in enumerate(self.batches(split)):
            first = np.int32(number * self.batch_size)
            found = jax.device_get(self._look(params, batch, first, self.batch_size))
            real = found[0]["mask"] > 0
            yield jax.tree.map(lambda x, real=real: x[real], found)

    @functools.cached_property
    def _first_batch(self) -> Batch:
        return next(self.batches())

    @functools.cached_property
    def _look(self) -> jax.stages.Wrapped:
        def look(params, batch, first, count):
            model = with_image_size(set_params(self.graphdef, params), batch["image"].shape[1:3])
            keys = example_keys(self.seed, first, len(batch["image"]))
            with kernels_over(self.mesh):
                out = self.task.predict(model, batch, keys)
            return jax.tree.map(lambda x: x[:count], (dict(batch), out))

        # A copy on each device, so that every process can read all of it.
        return jax.jit(look, static_argnums=3, out_shardings=replicated(self.mesh))

    def look(self, params: Params, count: int) -> tuple[HostBatch, Any]:
        """The first `count` examples of the split, at most a batch, and what the model predicts for them."""
        return jax.device_get(self._look(params, self._first_batch, np.int32(0), count))

    def __call__(self, params: Params) -> tuple[dict[str, float], int]:
        """Mean of each metric, and the number of examples.

        Raises DeviceError before the first batch if the step does not fit the device; DataError as `batches`.
        """
        sums = None
        for number, batch in enumerate(self.batches()):
            if number == 0:
                self.check(params, batch)
            first = np.int32(number * self.batch_size)
            sums = add(sums, self.step(params, batch, first))
        sums = jax.device_get(sums)
        scores, count = means(sums), int(next(iter(sums.values()))[1])
        return scores | self.task.split_metrics(functools.partial(self.outputs, params)), count


def shard(params: Params, mesh: Mesh) -> Params:
    """Parameters placed on the mesh."""
    return jax.device_put(params, tree_shardings(params, mesh))


def throughput(candidates: Sequence[tuple[Evaluator, Params]], rounds: int = 7) -> list[float]:
    """Images/s of each candidate's evaluation step on the same batch.

    Candidates take turns, so that what else the machine does hits all alike; the median of `rounds` counts.

    Raises DeviceError if a step does not fit the device.
    """
    batch = next(iter(candidates[0][0].batches()))
    for evaluator, params in candidates:
        evaluator.check(params, batch)
    runs = [
        functools.partial(_score_and_wait, evaluator, params, batch)
        for evaluator, params in candidates
    ]
    seconds = interleaved_seconds(runs, rounds)
    return list(candidates[0][0].batch_size / np.median(seconds, axis=0))


def _score_and_wait(evaluator: Evaluator, params: Params, batch: Batch) -> None:
    jax.block_until_ready(evaluator.step(params, batch, np.int32(0)))
