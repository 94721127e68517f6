"""What steps, evaluation and stages ask of a task, and what tasks have in common.

A task is one file: a subclass of `Task`, and its line in `tasks.TASKS`. `run` and `stage` below are a `RunConfig` and a
`StageConfig`, which live above this room.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tosa_jax.models.vit import Output
from tosa_jax.ops.array_types import Images, PerExample, RawImages

Batch = Mapping[str, jax.Array]
HostBatch = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class NoOptions:
    """Of a task that has no fields of its own."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a batch holds, the loss and the metrics.

    options            the dataclass of its fields in the section `task` of a recipe.
    best_metric        what the best checkpoint is chosen by; high unless `lower_is_better`.
    draws_predictions  its pictures show more than selected tokens.
    mean, std          a channel, of pixels in [0, 1].
    """

    options: ClassVar[type] = NoOptions
    best_metric: ClassVar[str]
    lower_is_better: ClassVar[bool] = False
    draws_predictions: ClassVar[bool] = False

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_run(cls, run: Any, stage: Any) -> "Task":
        """The task as a stage of a run has it."""
        raise NotImplementedError

    @classmethod
    def of_network(
        cls, network: Any, options: Any, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> "Task":
        """The task of a trained network (a `ViTConfig`), as evaluation has it; `options` as in the section `task`."""
        raise NotImplementedError

    @classmethod
    def check_run(cls, run: Any) -> None:
        """Raise a ConfigError for a field that this task cannot follow."""

    @classmethod
    def check_dataset(cls, run: Any, facts: Any) -> None:
        """Raise a ConfigError where the data (`DatasetFacts`) are not what this task learns from.

        Not asked where no labels are used: selectors are fitted to any images.
        """
        raise NotImplementedError

    def inputs(self, images: RawImages) -> Images:
        """uint8 pixels -> normalised float32."""
        mean, std = (jnp.asarray(x).reshape(1, 1, 1, -1) for x in (self.mean, self.std))
        return (images.astype(jnp.float32) / 255 - mean) / std

    def predict(self, model: Callable[..., Output], images: RawImages, key: jax.Array) -> Output:
        """What is scored: the model's output for uint8 pixels."""
        return model(self.inputs(images), key=key)

    def training_batch(self, batch: Batch, key: jax.Array) -> tuple[Images, Any]:
        """Normalised images, and the targets for `loss`."""
        raise NotImplementedError

    def loss(self, out: Output, targets: Any) -> PerExample:
        """What training makes small, against the targets of `training_batch`."""
        raise NotImplementedError

    def distillation(self, out: Output, teacher: Output) -> PerExample:
        """How far the network is from its teacher."""
        raise NotImplementedError

    def metrics(self, out: Output, batch: Batch) -> dict[str, Float[Array, " b"]]:
        """Per-example scores of a batch, in the order in which tables show them; padding may give anything."""
        raise NotImplementedError

    def check_batch(self, batch: HostBatch, first: int) -> None:
        """Raise a DataError for an evaluation example that cannot be scored; the first one has the number `first`."""

    def pictures(
        self, batch: HostBatch, out: Output, network: Any, class_names: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        """Figures, RGB by file name, of a few examples; `network` is a `ViTConfig`. Without names, no labels."""
        raise NotImplementedError


def input_fields(run: Any) -> dict[str, tuple[float, ...]]:
    """`mean` and `std` of a run, a value for each channel."""
    channels = run.model.in_chans
    given = {"mean": run.inputs.mean, "std": run.inputs.std}
    return {name: x * channels if len(x) == 1 else x for name, x in given.items()}
