"""Image classification: batches of `image` uint8 [b height width c] and `label` int32 [b]."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tosa_jax.data.class_names import readable
from tosa_jax.errors import ConfigError
from tosa_jax.models.vit import Output
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import PerExample
from tosa_jax.reporting.figures import write_png
from tosa_jax.reporting.token_pictures import draw_tokens
from tosa_jax.tasks import losses
from tosa_jax.tasks.metrics import top_k_correct
from tosa_jax.tasks.mixing import (
    MixingConfig,
    erase,
    mix,
    mix_images,
    own_shares,
    patch_shares,
)
from tosa_jax.tasks.prediction_writer import PredictionWriter, Record
from tosa_jax.tasks.predictions import Guess, Prediction
from tosa_jax.tasks.registry import register
from tosa_jax.tasks.task import (
    Batch,
    HostBatch,
    Loss,
    RunSettings,
    StageSettings,
    State,
    Task,
    input_fields,
)


class ClassWriter(PredictionWriter):
    """Writes the classes of highest probability, and figures of the selections with their scores."""

    foreign = ("depth_dir", "truth", "depth_scale")

    def guesses(self, prediction: Prediction) -> list[Guess]:
        """What is written of a prediction of one row, the likeliest first."""
        return self.predictor.top(prediction, self.args.top or 5)[0]

    def record(self, path: Path, image: np.ndarray, prediction: Prediction) -> Record:
        guesses = self.guesses(prediction)
        top = [{"class": g.label, "name": g.name, "probability": g.probability} for g in guesses]
        record = {"image": str(path), "top": top}
        if self.args.show_tokens:
            target = self._free(self.args.show_tokens / f"{path.stem}.png")
            figure = draw_tokens(
                self.predictor.config,
                image[None],
                prediction.selected,
                scores=prediction.scores,
                labels=[", ".join(f"{g.name}, {g.probability:.1%}" for g in guesses[:1])],
            )
            write_png(target, figure)
            record["tokens"] = str(target)
        return record

    def lines(self, record: Record) -> list[str]:
        width = max((len(guess["name"]) for guess in record["top"]), default=0)
        return [f"  {g['name']:{width}}  {g['probability']:6.1%}" for g in record["top"]]


@register("classification")
@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Softmax cross-entropy with label smoothing. Batches hold `image` and `label`.

    patch_size  of the model, pixels; read where mixing aligns labels.
    """

    prediction_writer: ClassVar[type[PredictionWriter]] = ClassWriter
    best_metric: ClassVar[str] = "acc1"

    num_classes: int
    label_smoothing: float = 0.0
    mixing: MixingConfig = MixingConfig()
    patch_size: int = 1

    @classmethod
    def from_run(cls, run: RunSettings, stage: StageSettings) -> "Classification":
        """The task with this stage's smoothing and mixing."""
        return cls(
            num_classes=run.model.num_classes,
            label_smoothing=stage.label_smoothing,
            mixing=stage.mixing,
            patch_size=run.model.patch_size,
            distill_weight=stage.distill_weight,
            **input_fields(run),
        )

    @classmethod
    def of_model(
        cls, config: ViTConfig, options: Any, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> "Classification":
        return cls(num_classes=config.num_classes, mean=mean, std=std)

    @classmethod
    def check_run(cls, run: Any) -> None:
        for stage in ("pretrain", "finetune"):
            check(
                run.model.has_plan or not getattr(run, stage).align_labels,
                f"config.{stage}.align_labels=True: a {run.model.architecture!r} has no tokens that labels of patches "
                "travel with; set it to False",
            )

    @classmethod
    def check_dataset(cls, run: RunSettings, facts: Any) -> None:
        cls.check_kind(run, facts, "single class an image")
        cls.check_classes(run, facts)

    @staticmethod
    def check_classes(run: RunSettings, facts: Any) -> None:
        """Raise a ConfigError if the head has another number of classes than the data."""
        if run.model.num_classes != facts.num_classes:
            raise ConfigError(
                f"config.model.num_classes={run.model.num_classes}, but {run.data.name!r} has "
                f"{facts.num_classes} classes: set it to that"
            )

    @classmethod
    def example(cls, config: ViTConfig) -> Batch:
        return {**super().example(config), "label": jax.ShapeDtypeStruct((), jnp.int32)}

    @staticmethod
    def run_model(model: Callable[..., Any], images: jax.Array, key: jax.Array | None) -> Output:
        """Without the tokens: no loss and no score of classes reads them."""
        return model(images, key=key, tokens=False)

    def training_batch(self, batch: Batch, key: jax.Array) -> Batch:
        """`image`, normalised, erased and mixed, and `target` float [b classes], smoothed and mixed alike.

        Where labels are aligned, `target` is the image's own, `partner` [b classes] that of the one mixed into it, and
        `patch_share` [b patches] the share of each patch that is the image's own.
        """
        targets = losses.smoothed_targets(batch["label"], self.num_classes, self.label_smoothing)
        erase_key, mix_key = jax.random.split(key)
        images = erase(self.mixing, erase_key, self.inputs(batch["image"]))
        if self.mixing.align_labels:
            own = own_shares(self.mixing, mix_key, (images.shape[1], images.shape[2]))
            share = patch_shares(own, self.patch_size)
            return {
                "image": mix_images(images, own),
                "target": targets,
                "partner": targets[::-1],
                "patch_share": jnp.broadcast_to(share, (len(images), len(share))),
            }
        images, targets = mix(self.mixing, mix_key, images, targets)
        return {"image": images, "target": targets}

    def training_loss(
        self,
        forward: Callable[..., Any],
        batch: Batch,
        keys: jax.Array,
        teacher: Callable[..., Any] | None,
        state: State,
    ) -> Loss:
        """As the base class; labels that are aligned go through the forward pass with the tokens."""
        if "patch_share" in batch:
            forward = functools.partial(forward, patch_labels=batch["patch_share"])
        return super().training_loss(forward, batch, keys, teacher, state)

    def loss(self, out: Output, batch: Batch) -> PerExample:
        """Cross-entropy in nats against `target`, mixed with `partner` as the network mixed the tokens' labels."""
        target = batch["target"]
        if "partner" in batch:
            share = out.aux["label"][:, None]
            target = target * share + batch["partner"] * (1 - share)
        return losses.soft_cross_entropy(out.logits, target)

    def distillation(self, out: Output, teacher: Output) -> PerExample:
        """Forward KL from the teacher's class distribution."""
        return losses.distillation_kl(out.logits, teacher.logits)

    def metrics(self, out: Output, batch: Batch) -> dict[str, Float[Array, " b"]]:
        """Per-example `loss` (without smoothing), `acc1` and, with more than five classes, `acc5`."""
        logits, labels = out.logits.astype(jnp.float32), batch["label"]
        hot = jax.nn.one_hot(labels, logits.shape[1])
        values = {
            "loss": losses.soft_cross_entropy(logits, hot),
            "acc1": top_k_correct(logits, labels, 1).astype(jnp.float32),
        }
        if logits.shape[1] > 5:
            values["acc5"] = top_k_correct(logits, labels, 5).astype(jnp.float32)
        return values

    def pictures(
        self, batch: HostBatch, out: Output, config: ViTConfig, class_names: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        names = readable(class_names)
        labels = [names[i] for i in batch["label"]] if names else None
        return draw_labelled(batch, out, config, labels)


def draw_labelled(
    batch: HostBatch, out: Output, config: ViTConfig, labels: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """`Task.pictures` of tasks that name what is in an image: the selected tokens, beside a text an image."""
    if not out.selected:
        return {}
    selected = [np.asarray(x) for x in out.selected]
    return {"selected_tokens": draw_tokens(config, batch["image"], selected, labels=labels)}
