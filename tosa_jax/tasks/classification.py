"""Image classification: batches of `image` uint8 [b height width c] and `label` int32 [b]."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tosa_jax import losses
from tosa_jax.array_types import Images, PerExample, RawImages
from tosa_jax.data.mixing import MixingConfig, erase, mix
from tosa_jax.metrics import top_k_correct
from tosa_jax.models.vit import Output

Batch = Mapping[str, jax.Array]
Targets = Float[Array, "b classes"]


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Softmax cross-entropy with label smoothing; `best_metric` is what the best checkpoint is chosen by."""

    mean: tuple[float, ...]  # a channel, of pixels in [0, 1]
    std: tuple[float, ...]
    num_classes: int
    label_smoothing: float = 0.0
    mixing: MixingConfig = MixingConfig()
    best_metric: str = "acc1"

    def inputs(self, images: RawImages) -> Images:
        """uint8 pixels -> normalised float32."""
        mean, std = (jnp.asarray(x).reshape(1, 1, 1, -1) for x in (self.mean, self.std))
        return (images.astype(jnp.float32) / 255 - mean) / std

    def training_batch(self, batch: Batch, key: jax.Array) -> tuple[Images, Targets]:
        """Normalised images and their targets, smoothed, erased and mixed."""
        targets = losses.smoothed_targets(batch["label"], self.num_classes, self.label_smoothing)
        erase_key, mix_key = jax.random.split(key)
        images = erase(self.mixing, erase_key, self.inputs(batch["image"]))
        return mix(self.mixing, mix_key, images, targets)

    def loss(self, out: Output, targets: Targets) -> PerExample:
        """Cross-entropy in nats against the targets of `training_batch`."""
        return losses.soft_cross_entropy(out.logits, targets)

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


@dataclass(frozen=True, kw_only=True)
class SelectorFitting:
    """The objective of the selector stage on top of a task: needs images, no labels."""

    task: Classification
    best_metric: str = "selector/recall"

    def inputs(self, images: RawImages) -> Images:
        return self.task.inputs(images)

    def training_batch(self, batch: Batch, key: jax.Array) -> tuple[Images, None]:
        """Normalised images; there are no targets."""
        return self.inputs(batch["image"]), None

    def loss(self, out: Output, targets: None = None) -> PerExample:
        """KL from the true map of each selective layer to its selector's prediction, summed over selectors."""
        return sum(x for name, x in out.aux.items() if name.startswith("selector/kl/"))

    def metrics(self, out: Output, batch: Batch) -> dict[str, Float[Array, " b"]]:
        """What the layers report, each and as the mean over selectors."""
        values = dict(out.aux)
        for group in sorted({name.rpartition("/")[0] for name in out.aux}):
            members = [x for name, x in out.aux.items() if name.rpartition("/")[0] == group]
            values[group] = sum(members) / len(members)
        return values
