"""What a model predicts for images, on the host."""

from typing import NamedTuple

import numpy as np

from tosa_jax.errors import NonFiniteOutputError


class Guess(NamedTuple):
    """A class, its name, and its probability in [0, 1]; None for a text that was written and is no class."""

    label: int | None
    name: str
    probability: float


class Prediction(NamedTuple):
    """What a model predicts for `b` images.

    predictions  float32 arrays by name, the first axis is the image: `logits` [b c] of a classifier, `depth`
                 [b height width] in metres, or what another task's model returns.
    selected     one int32 [b s] a selection: indices into the tokens, ascending, prefix included.
    scores       one float [b n] a selection: what it chose by, higher is better.
    """

    predictions: dict[str, np.ndarray]
    selected: tuple[np.ndarray, ...]
    scores: tuple[np.ndarray, ...]

    @property
    def logits(self) -> np.ndarray | None:
        """float32 [b c]; None for a model without classes."""
        return self.predictions.get("logits")

    @property
    def features(self) -> np.ndarray | None:
        """float32 [b d], what a head would classify, of a model made with `num_classes=0`; None for any other."""
        return self.predictions.get("features")

    @property
    def depth(self) -> np.ndarray | None:
        """float32 [b height width] in metres; None for a model that predicts none."""
        return self.predictions.get("depth")

    @property
    def probabilities(self) -> np.ndarray:
        """float32 [b, c]; each row sums to 1. Raises ValueError without logits."""
        if self.logits is None:
            raise ValueError("a prediction without logits has no probabilities")
        powers = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


def check_finite(prediction: Prediction) -> None:
    """Raises NonFiniteOutputError for predictions that are NaN or infinite."""
    for name, x in prediction.predictions.items():
        if not np.isfinite(x).all():
            raise NonFiniteOutputError(
                f"the model gives {name} that are not finite: its weights are damaged, or too large for its dtype"
            )
