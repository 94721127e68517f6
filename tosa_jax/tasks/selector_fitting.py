"""The objective of the selector stage, which wraps the run's task: it needs images and no labels."""

from dataclasses import dataclass
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from tosa_jax.models.vit import Output
from tosa_jax.ops.array_types import PerExample
from tosa_jax.tasks.task import Batch, Task


@dataclass(frozen=True, kw_only=True)
class SelectorFitting(Task):
    """Each selector learns the next layer's attention map; the layers compare the two and report the distance.

    Evaluation never mirrors images, and no example is refused.
    """

    best_metric: ClassVar[str] = "selector/recall"

    @classmethod
    def of_task(cls, task: Task) -> "SelectorFitting":
        """The objective for the images of a task."""
        return cls(mean=task.mean, std=task.std)

    def training_batch(self, batch: Batch, key: jax.Array) -> Batch:
        """`image`, normalised; there are no targets."""
        return {"image": self.inputs(batch["image"])}

    def loss(self, out: Output, batch: Batch) -> PerExample:
        """KL in nats from the true map of each selective layer to its selector's prediction, summed over selectors."""
        terms = [x for name, x in out.aux.items() if name.startswith("selector/kl/")]
        return sum(terms[1:], start=terms[0])

    def metrics(self, out: Output, batch: Batch) -> dict[str, Float[Array, " b"]]:
        """What the layers report, each and as the mean over selectors."""
        values = dict(out.aux)
        for group in sorted({name.rpartition("/")[0] for name in out.aux}):
            members = [x for name, x in out.aux.items() if name.rpartition("/")[0] == group]
            values[group] = sum(members[1:], start=members[0]) / len(members)
        return values
