"""The task protocol: everything that the training loop, evaluation and prediction ask of a task.

A task is a subclass of `Task` in one file, with `@register("name")` of `tasks.registry` above it. The base class
implements the common supervised case (one forward pass, one loss, an optional frozen teacher), so that a task only
overrides what differs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tosa_jax.models.vit import Output, VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import Images, PerExample, RawImages
from tosa_jax.tasks.mixing import MixingConfig
from tosa_jax.tasks.prediction_writer import PredictionWriter

Batch = Mapping[str, Any]
"""Arrays by name whose first axis is the example; nested mappings and further kinds of arrays, such as text tokens,
are allowed."""
HostBatch = Mapping[str, Any]
"""The same as NumPy arrays."""
State = Any
"""What a task carries from step to step: a pytree of arrays, `{}` where there is nothing."""
SplitOutputs = Callable[[str], Iterator[tuple[HostBatch, Any]]]
"""A split, "train" or "eval" -> its batches without padding and what `Task.predict` gives for them, on the host."""


@runtime_checkable
class InputSettings(Protocol):
    """The part of `config.InputConfig` that tasks read."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Of a channel's pixels in [0, 1]."""
        ...

    @property
    def std(self) -> tuple[float, ...]:
        """Of a channel's pixels in [0, 1]."""
        ...


@runtime_checkable
class RunSettings(Protocol):
    """The part of `config.RunConfig` that tasks read; the class itself lives above this package."""

    @property
    def model(self) -> ViTConfig:
        """The model's configuration."""
        ...

    @property
    def inputs(self) -> InputSettings:
        """How pixels are normalised."""
        ...

    @property
    def options(self) -> Any:
        """The task's own fields, an instance of `Task.options`."""
        ...

    @property
    def data(self) -> Any:
        """The `DataConfig`."""
        ...


@runtime_checkable
class StageSettings(Protocol):
    """The part of `config.StageConfig` that tasks read."""

    @property
    def label_smoothing(self) -> float:
        """In [0, 1)."""
        ...

    @property
    def distill_weight(self) -> float:
        """Weight of the distillation term; 0: no teacher."""
        ...

    @property
    def mixing(self) -> MixingConfig:
        """How batches are mixed and erased."""
        ...


class Loss(NamedTuple):
    """What `Task.training_loss` returns.

    values      float [b], one value an example; training minimises their mean over the whole batch, which is the same
                however the batch is split over parts (`accumulate`), devices and processes. An example that counts
                more or less than another gets its weight in `training_batch`, which sees the whole batch
                (`losses.batch_weights`).
    statistics  a pytree of floats that are means over the examples, for `Task.update_state`.
    running     new values of the network's running statistics by path (`Output.running`).
    """

    values: PerExample
    statistics: Any = ()
    running: Mapping[str, jax.Array] = {}


@dataclass(frozen=True)
class FrozenTeacher:
    """The run's trained dense model; its parameters never change."""


@dataclass(frozen=True)
class AverageTeacher:
    """An exponential moving average of the model that is trained, starting as a copy of it.

    decay  (updates done, updates in the stage) -> the share in [0, 1] that the average keeps in this update:
           `teacher = decay * teacher + (1 - decay) * model`, in float32, after the optimizer's update.
    """

    decay: Callable[[jax.Array, int], Any]


Teacher = FrozenTeacher | AverageTeacher


@dataclass(frozen=True)
class NoOptions:
    """For a task that has no fields of its own."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Batches, forward passes and loss, predictions, metrics, writers and pictures of one task.

    options            dataclass of the task's own fields, the section `task` of a recipe.
    model_class        the model that `create_model(task=...)` builds.
    data_kind          the kind of data set that it learns from (`DatasetFacts.kind`).
    prediction_writer  what `python -m tosa_jax.predict` prints and writes.
    best_metric        what the best checkpoint is chosen by: the highest, or with `lower_is_better` the lowest.
    draws_predictions  whether `pictures` shows more than selected tokens.
    mean, std          one value a channel, of pixels in [0, 1].
    distill_weight     weight of `distillation` in the default `training_loss`; above 0 the teacher is frozen.
    """

    options: ClassVar[type] = NoOptions
    model_class: ClassVar[type[VisionTransformer]] = VisionTransformer
    data_kind: ClassVar[str] = "classification"
    prediction_writer: ClassVar[type[PredictionWriter]] = PredictionWriter
    best_metric: ClassVar[str]
    lower_is_better: ClassVar[bool] = False
    draws_predictions: ClassVar[bool] = False

    mean: tuple[float, ...]
    std: tuple[float, ...]
    distill_weight: float = 0.0

    @classmethod
    def from_run(cls, run: RunSettings, stage: StageSettings) -> "Task":
        """The task as a stage of a run trains it."""
        raise NotImplementedError

    @classmethod
    def of_model(
        cls, config: ViTConfig, options: Any, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> "Task":
        """The task of a trained model, as prediction uses it; `options` as in the section `task` of a recipe."""
        raise NotImplementedError

    @classmethod
    def check_run(cls, run: Any) -> None:
        """Raise a ConfigError for a field of the run that this task cannot follow."""

    @classmethod
    def check_dataset(cls, run: RunSettings, facts: Any) -> None:
        """Raise a ConfigError if the data (`DatasetFacts`) are not what this task learns from.

        Not called for runs that use no labels: selectors are fitted to any images.
        """

    @classmethod
    def check_kind(cls, run: RunSettings, facts: Any, what: str) -> None:
        """Raise a ConfigError if the data are of another kind than `data_kind`: they have no `what`."""
        check(
            facts.kind == cls.data_kind,
            f"config.data.name={run.data.name!r} has no {what}: name another set, or a recipe for {facts.kind}",
        )

    @classmethod
    def plan(cls, run: Any, stages: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
        """The stages of a run (`train.stages.Stage`, in order) and the rows of its report (`Row`).

        Receives those that the recipe asks for; a task may add, replace or leave out some.
        """
        return stages, rows

    @classmethod
    def example(cls, config: ViTConfig) -> Batch:
        """Shapes and dtypes of one example (`jax.ShapeDtypeStruct`), by which steps are compiled without data."""
        image = (*config.image_shape, config.in_chans)
        return {"image": jax.ShapeDtypeStruct(image, jnp.uint8)}

    @classmethod
    def units(cls, config: ViTConfig) -> Mapping[str, str]:
        """The units of the predictions that have some, by name: for people who read them elsewhere."""
        return {}

    @property
    def teacher(self) -> Teacher | None:
        """Which teacher `training_loss` gets; None: none."""
        return FrozenTeacher() if self.distill_weight else None

    def init_state(self) -> State:
        """The task's state before the first step.

        It is checkpointed with the rest. A leaf is placed by its name in the table of `distributed.mesh`, as a
        parameter of that name would be; other names are replicated on all devices.
        """
        return {}

    def update_state(self, state: State, statistics: Any) -> State:
        """The state after a step; `statistics` are those of `Loss`, averaged over the whole batch."""
        return state

    def inputs(self, images: RawImages) -> Images:
        """uint8 pixels -> normalised float32."""
        return self.normalised(images.astype(jnp.float32) / 255)

    def normalised(self, images: Images) -> Images:
        """Pixels in [0, 1], float32 -> as the model takes them."""
        mean, std = (jnp.asarray(x).reshape(1, 1, 1, -1) for x in (self.mean, self.std))
        return (images - mean) / std

    def training_batch(self, batch: Batch, key: jax.Array) -> Batch:
        """What `training_loss` gets: augmented and normalised, with targets and weights.

        Sees the whole batch of all devices. The default gives `image`, normalised, and the other arrays as they are.
        """
        del key
        return {**batch, "image": self.inputs(batch["image"])}

    def training_loss(
        self,
        forward: Callable[..., Any],
        batch: Batch,
        keys: jax.Array,
        teacher: Callable[..., Any] | None,
        state: State,
    ) -> Loss:
        """The loss of a part of a batch.

        forward  the model in training mode, differentiable: `forward(images, key=keys)`; may be called several times.
        batch    some rows of `training_batch`.
        keys     one random key an example, [b].
        teacher  the teacher in evaluation mode, `teacher(images)`; None without one. No gradient reaches it.
        state    of `init_state` and `update_state`.
        """
        del state
        out = self.run_model(forward, batch["image"], keys)
        values = self.loss(out, batch) + out.layer_losses
        if teacher is not None:
            taught = self.run_model(teacher, batch["image"], None)
            values = values + self.distill_weight * self.distillation(out, taught)
        return Loss(values, running=out.running)

    def loss(self, out: Output, batch: Batch) -> PerExample:
        """The value of each example for the default `training_loss`; `batch` is that of `training_batch`."""
        raise NotImplementedError

    def distillation(self, out: Output, teacher: Output) -> PerExample:
        """The distance of the model's output from the teacher's, for the default `training_loss`."""
        raise NotImplementedError

    def predict(self, model: Callable[..., Any], batch: Batch, key: jax.Array) -> Any:
        """What is scored and shown, for a batch with uint8 `image`: by default the model's output.

        `key` is one for each example, [b], or one for all.
        """
        return self.run_model(model, self.inputs(batch["image"]), key)

    @staticmethod
    def run_model(model: Callable[..., Any], images: jax.Array, key: jax.Array | None) -> Any:
        """The model's output for normalised images, as the default loss and `predict` want it."""
        return model(images, key=key)

    def metrics(self, out: Any, batch: Batch) -> dict[str, Float[Array, " b"]]:
        """Scores of what `predict` gave, one value an example, in the order in which tables show them.

        Padded examples may get any value: they are masked.
        """
        raise NotImplementedError

    def split_metrics(self, outputs: SplitOutputs) -> dict[str, float]:
        """Scores that need more than one example at a time, such as k-NN on training features or retrieval."""
        del outputs
        return {}

    def check_batch(self, batch: HostBatch, first: int) -> None:
        """Raise a DataError for an evaluation example that cannot be scored; the first one has the number `first`."""

    def pictures(
        self, batch: HostBatch, out: Any, config: ViTConfig, class_names: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        """Figures, uint8 RGB by file name, of a few examples. Without class names they have no labels."""
        return {}


def check_unused(run: Any, fields: Sequence[str]) -> None:
    """Raise a ConfigError for a field of a stage that the run's task does not follow."""
    for stage in ("pretrain", "selector", "finetune"):
        for name in fields:
            check(
                getattr(getattr(run, stage), name) == 0,
                f"config.{stage}.{name} is for classification: {run.task!r} needs it to be 0",
            )


def input_fields(run: RunSettings) -> dict[str, tuple[float, ...]]:
    """`mean` and `std` of a run, one value a channel."""
    channels = run.model.in_chans
    given = {"mean": run.inputs.mean, "std": run.inputs.std}
    return {name: x * channels if len(x) == 1 else x for name, x in given.items()}
