"""Image classification: batches of `image` uint8 [b height width c] and `label` int32 [b]."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tosa_jax.data.class_names import readable
from tosa_jax.errors import ConfigError
from tosa_jax.models.vit import Output
from tosa_jax.ops.array_types import Images, PerExample
from tosa_jax.reporting.token_pictures import draw_tokens
from tosa_jax.tasks import losses
from tosa_jax.tasks.metrics import top_k_correct
from tosa_jax.tasks.mixing import MixingConfig, erase, mix
from tosa_jax.tasks.task import Batch, HostBatch, Task, input_fields

Targets = Float[Array, "b classes"]


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Softmax cross-entropy with label smoothing. Batches hold `image` and `label`."""

    best_metric: ClassVar[str] = "acc1"

    num_classes: int
    label_smoothing: float = 0.0
    mixing: MixingConfig = MixingConfig()

    @classmethod
    def from_run(cls, run: Any, stage: Any) -> "Classification":
        """The task with this stage's smoothing and mixing."""
        return cls(
            num_classes=run.model.num_classes,
            label_smoothing=stage.label_smoothing,
            mixing=stage.mixing,
            **input_fields(run),
        )

    @classmethod
    def of_network(
        cls, network: Any, options: Any, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> "Classification":
        return cls(num_classes=network.num_classes, mean=mean, std=std)

    @classmethod
    def check_dataset(cls, run: Any, facts: Any) -> None:
        if facts.kind != "classification":
            raise ConfigError(
                f"config.data.name={run.data.name!r} has no classes: name another set, or a recipe for {facts.kind}"
            )
        if run.model.num_classes != facts.num_classes:
            raise ConfigError(
                f"config.model.num_classes={run.model.num_classes}, but {run.data.name!r} has "
                f"{facts.num_classes} classes: set it to that"
            )

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

    def pictures(
        self, batch: HostBatch, out: Output, network: Any, class_names: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        if not out.selected:
            return {}
        names = readable(class_names)
        labels = [names[i] for i in batch["label"]] if names else None
        figure = draw_tokens(network, batch["image"], out.selected, labels=labels)
        return {"selected_tokens": figure}
