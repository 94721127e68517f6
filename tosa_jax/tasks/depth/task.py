"""The task of monocular depth: scale-invariant log loss; Eigen's metrics with their crops and ranges.

Protocol of BTS and NeWCRFs (cleinc/bts, aliyun/NeWCRFs) on NYU Depth V2: depth in (1e-3, 10) m inside Eigen's crop,
predictions clipped to that range, averaged with the prediction of the mirrored image, errors of each image averaged.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tosa_jax.errors import DataError
from tosa_jax.models.vit import Output, VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check, check_choice
from tosa_jax.ops.array_types import PerExample
from tosa_jax.reporting.token_pictures import draw_depth
from tosa_jax.tasks.depth.errors import depth_errors, log_difference, silog
from tosa_jax.tasks.depth.network import DepthTransformer
from tosa_jax.tasks.depth.writer import DepthWriter
from tosa_jax.tasks.losses import batch_weights
from tosa_jax.tasks.prediction_writer import PredictionWriter
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

DepthMaps = Float[Array, "b height width"]
AnyMaps = Float[Array | np.ndarray, "b height width"]
AnyMask = Bool[Array | np.ndarray, "b height width"]

CROPS = {
    "none": ("0", "1", "0", "1"),
    # Rows 45 to 471 and columns 41 to 601 of 480x640 (Eigen et al. 2014).
    "eigen": ("45/480", "471/480", "41/640", "601/640"),
    # For KITTI (Garg et al. 2016).
    "garg": ("0.40810811", "0.99189189", "0.03594771", "0.96405229"),
}
"""Which part of an image is scored: first row, end row, first column, end column, as shares of the sides.

They are texts for exact fractions: products of floats can fall on the wrong side of a whole number.
"""


def crop_box(crop: str, height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns of an image that a key of `CROPS` scores; ends are rounded down, as the references do."""
    top, bottom, left, right = map(Fraction, CROPS[crop])
    rows = slice(int(top * height), int(bottom * height))
    return rows, slice(int(left * width), int(right * width))


@dataclass(frozen=True, kw_only=True)
class DepthOptions:
    """Fields of the section `task`.

    crop             what is scored, a key of `CROPS`.
    min_depth        metres: nearer truth is not scored, nearer predictions are moved there. The far end is the
                     model's `max_depth`.
    min_train_depth  metres: nearer truth is not learnt from, nor is truth from `max_depth` on.
    flip_average     scores the mean of the prediction and that of the mirrored image: twice the work.
    """

    crop: str = "none"
    min_depth: float = 1e-3
    min_train_depth: float = 0.1
    flip_average: bool = False

    def __post_init__(self) -> None:
        check_choice("crop", self.crop, CROPS)
        for name in ("min_depth", "min_train_depth"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be above 0")


@register("depth")
@dataclass(frozen=True, kw_only=True)
class Depth(Task):
    """Batches hold `image` and `depth`, float32 [b height width] in metres, 0 where nothing was measured."""

    options: ClassVar[type] = DepthOptions
    model_class: ClassVar[type[VisionTransformer]] = DepthTransformer
    data_kind: ClassVar[str] = "depth"
    prediction_writer: ClassVar[type[PredictionWriter]] = DepthWriter
    best_metric: ClassVar[str] = "abs_rel"
    lower_is_better: ClassVar[bool] = True
    draws_predictions: ClassVar[bool] = True

    max_depth: float
    scoring: DepthOptions = DepthOptions()

    @classmethod
    def from_run(cls, run: RunSettings, stage: StageSettings) -> "Depth":
        task = cls.of_model(run.model, run.options, **input_fields(run))
        return dataclasses.replace(task, distill_weight=stage.distill_weight)

    @classmethod
    def of_model(
        cls, config: Any, options: Any, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> "Depth":
        return cls(max_depth=config.max_depth, scoring=options, mean=mean, std=std)

    @classmethod
    def check_run(cls, run: Any) -> None:
        check(run.model.depth_estimation_type == "metric",
              "config.model.depth_estimation_type='relative' has no metres to train or score: give 'metric', or use "
              "the network through Predictor.from_pretrained")  # fmt: skip
        check_unused(run, ("label_smoothing", "mixup", "cutmix", "erase_prob"))

    @classmethod
    def check_dataset(cls, run: RunSettings, facts: Any) -> None:
        cls.check_kind(run, facts, "depth")

    def valid(self, truth: AnyMaps, nearest: float) -> AnyMask:
        """Pixels with a measured depth in (nearest, max_depth).

        The far end holds in training too, as no prediction can be deeper. BTS and NeWCRFs have it in evaluation alone.
        """
        return (truth > nearest) & (truth < self.max_depth)

    def scored(self, truth: AnyMaps) -> AnyMask:
        """Pixels that count in evaluation: in range and inside the crop."""
        height, width = truth.shape[1:]
        inside = np.zeros((1, height, width), bool)
        inside[:, *crop_box(self.scoring.crop, height, width)] = True
        return self.valid(truth, self.scoring.min_depth) & inside

    @classmethod
    def example(cls, config: ViTConfig) -> Batch:
        depth = jax.ShapeDtypeStruct(config.image_shape, jnp.float32)
        return {**super().example(config), "depth": depth}

    @classmethod
    def units(cls, config: Any) -> dict[str, str]:
        """Metres, or what relative depth is."""
        metric = config.depth_estimation_type == "metric"
        return {"depth": "metres" if metric else "none: relative inverse depth, larger is nearer"}

    def training_batch(self, batch: Batch, key: jax.Array) -> Batch:
        """Normalised `image`, `depth`, and `weight` [b]: the mean of the loss counts images with a valid pixel."""
        seen = self.valid(batch["depth"], self.scoring.min_train_depth).any(axis=(1, 2))
        return {**super().training_batch(batch, key), "weight": batch_weights(jnp.asarray(seen))}

    def loss(self, out: Output, batch: Batch) -> PerExample:
        """`silog` in nats times `weight`; 0 for an image without a valid pixel."""
        valid = jnp.asarray(self.valid(batch["depth"], self.scoring.min_train_depth))
        return batch["weight"] * silog(out.depth, batch["depth"], valid)

    def distillation(self, out: Output, teacher: Output) -> PerExample:
        """Mean distance of the logarithms of the two depths."""
        everywhere = jnp.ones(out.depth.shape, bool)
        return jnp.abs(log_difference(out.depth, teacher.depth, everywhere)).mean(axis=(1, 2))

    def predict(self, model: Callable[..., Output], batch: Batch, key: jax.Array) -> Output:
        out = super().predict(model, batch, key)
        if not self.scoring.flip_average:
            return out
        mirrored = super().predict(model, {"image": batch["image"][:, :, ::-1]}, key)
        depth = (out.depth + mirrored.depth[:, :, ::-1]) / 2
        return out._replace(predictions={"depth": depth})

    def metrics(self, out: Output, batch: Batch) -> dict[str, Float[Array, " b"]]:
        return self.errors(out.depth, batch["depth"])

    def errors(self, depth: DepthMaps, truth: DepthMaps) -> dict[str, Float[Array, " b"]]:
        """`metrics.depth_errors` of the clipped prediction over `scored` pixels, and the training loss over them."""
        scored = jnp.asarray(self.scored(truth))
        depth = jnp.clip(depth, self.scoring.min_depth, self.max_depth)
        return depth_errors(depth, truth, scored) | {"loss": silog(depth, truth, scored)}

    def check_batch(self, batch: HostBatch, first: int) -> None:
        scored = self.scored(batch["depth"]).any(axis=(1, 2))
        if (empty := np.flatnonzero(~scored & (batch["mask"] > 0))).size:
            raise DataError(
                f"evaluation image {first + empty[0]} has no pixel with a depth in ({self.scoring.min_depth:g}, "
                f"{self.max_depth:g}) m inside the crop {self.scoring.crop!r}: it cannot be scored; take it out of the "
                "split, or change config.task"
            )

    def pictures(
        self, batch: HostBatch, out: Output, config: ViTConfig, class_names: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        selected = [np.asarray(x) for x in out.selected]
        depth = np.asarray(out.depth)
        panel = draw_depth(config, batch["image"], depth, selected, truth=batch["depth"])
        return {"selected_tokens" if out.selected else "depth": panel}
