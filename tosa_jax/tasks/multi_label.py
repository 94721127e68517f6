"""Several labels an image by a plain head: a sigmoid for each class. Batches hold `image` and `labels` [b classes]."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tosa_jax.models.vit import Output, VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import PerExample
from tosa_jax.tasks.classification import Classification, ClassWriter, draw_labelled
from tosa_jax.tasks.label_sets import set_scores
from tosa_jax.tasks.prediction_writer import PredictionWriter
from tosa_jax.tasks.predictions import Guess, Prediction
from tosa_jax.tasks.registry import register
from tosa_jax.tasks.task import (
    Batch,
    HostBatch,
    RunSettings,
    StageSettings,
    Task,
    check_unused,
    input_fields,
)


@dataclass(frozen=True, kw_only=True)
class MultiLabelOptions:
    """Fields of the section `task`. Raises ConfigError for values out of range.

    threshold  a label is predicted from this probability on, in (0, 1); the likeliest one always is.
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        check(0 < self.threshold < 1, f"threshold={self.threshold} is not in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class MultiLabelConfig(ViTConfig):
    """A ViT whose head has a logit for each label: those of an image may be any number of them."""

    task: ClassVar[str] = "multi_label"


class MultiLabelTransformer(VisionTransformer):
    """The network of such a configuration, which computes what any classifier does."""

    config_class: ClassVar[type[ViTConfig]] = MultiLabelConfig


class MultiLabelWriter(ClassWriter):
    """Writes the predicted labels, or with `--top` the likeliest ones."""

    def guesses(self, prediction: Prediction) -> list[Guess]:
        assert prediction.logits is not None, "the task's network has a head"
        names = self.predictor.class_names
        shares = 1 / (1 + np.exp(-prediction.logits[0].astype(np.float64)))
        order = np.argsort(-shares, kind="stable")
        ranked = [Guess(int(i), names[i], float(shares[i])) for i in order]
        least = self.predictor.task.choices.threshold
        taken = max(sum(guess.probability >= least for guess in ranked), 1)
        return ranked[: self.args.top or taken]


@register("multi_label")
@dataclass(frozen=True, kw_only=True)
class MultiLabel(Task):
    """Binary cross-entropy in nats, the mean over classes."""

    options: ClassVar[type] = MultiLabelOptions
    model_class: ClassVar[type[VisionTransformer]] = MultiLabelTransformer
    data_kind: ClassVar[str] = "label_sets"
    prediction_writer: ClassVar[type[PredictionWriter]] = MultiLabelWriter
    best_metric: ClassVar[str] = "f1"

    choices: MultiLabelOptions = MultiLabelOptions()

    @classmethod
    def from_run(cls, run: RunSettings, stage: StageSettings) -> "MultiLabel":
        return cls.of_model(run.model, run.options, **input_fields(run))

    @classmethod
    def of_model(
        cls, config: ViTConfig, options: Any, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> "MultiLabel":
        return cls(choices=options, mean=mean, std=std)

    @classmethod
    def check_run(cls, run: Any) -> None:
        check_unused(run, ("label_smoothing", "mixup", "cutmix", "erase_prob", "distill_weight"))

    @classmethod
    def check_dataset(cls, run: RunSettings, facts: Any) -> None:
        cls.check_kind(run, facts, "sets of labels")
        Classification.check_classes(run, facts)

    @classmethod
    def example(cls, config: ViTConfig) -> Batch:
        return {
            **super().example(config),
            "labels": jax.ShapeDtypeStruct((config.num_classes,), jnp.uint8),
        }

    run_model = staticmethod(Classification.run_model)

    def loss(self, out: Output, batch: Batch) -> PerExample:
        logits, labels = (x.astype(jnp.float32) for x in (out.logits, batch["labels"]))
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean(axis=1)

    def metrics(self, out: Output, batch: Batch) -> dict[str, PerExample]:
        """`set_scores` of the classes whose probability is at least `threshold`, and the likeliest; and `loss`."""
        logits = out.logits.astype(jnp.float32)
        place = jnp.argsort(jnp.argsort(-logits, axis=1), axis=1)
        taken = (jax.nn.sigmoid(logits) >= self.choices.threshold) | (place == 0)
        scores = set_scores(batch["labels"] > 0, taken, place, batch["labels"])
        return scores | {"loss": self.loss(out, batch)}

    def pictures(
        self, batch: HostBatch, out: Output, config: ViTConfig, class_names: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        names = np.asarray(class_names)
        labels = [", ".join(names[row > 0]) for row in batch["labels"]] if class_names else None
        return draw_labelled(batch, out, config, labels)
