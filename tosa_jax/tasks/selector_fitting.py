"""The objective of the selector stage on top of a task: needs images, no labels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from tosa_jax.models.vit import Output
from tosa_jax.ops.array_types import Images, PerExample, RawImages
from tosa_jax.tasks.task import Batch, HostBatch, Task


@dataclass(frozen=True, kw_only=True)
class SelectorFitting:
    """Each selector learns the next layer's attention map, which the layers compare and report themselves."""

    task: Task
    best_metric: ClassVar[str] = "selector/recall"
    lower_is_better: ClassVar[bool] = False

    def inputs(self, images: RawImages) -> Images:
        """uint8 pixels -> normalised float32."""
        return self.task.inputs(images)

    def predict(self, model: Callable[..., Output], images: RawImages, key: jax.Array) -> Output:
        """What is scored: the model's output for uint8 pixels, never mirrored."""
        return model(self.inputs(images), key=key)

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

    def check_batch(self, batch: HostBatch, first: int) -> None:
        """Every image will do."""
