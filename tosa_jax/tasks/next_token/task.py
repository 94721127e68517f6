"""The task of naming what is in an image: each label is text, written by a decoder that reads the image's tokens.

Yue et al. 2024, "Object Recognition as Next Token Prediction" (arXiv 2312.02142). Not as published: the decoder is
small and starts at random, not from a language model; the vocabulary is made of the label names; there is no prompt;
positions are learned and count from 0 in each label, so that the order of labels means nothing; texts are compared
with labels character by character, not by meaning.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from tosa_jax.data.class_names import readable
from tosa_jax.models.vit import Output, VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import PerExample, Scores
from tosa_jax.tasks.classification import ClassWriter, draw_labelled
from tosa_jax.tasks.label_sets import set_scores
from tosa_jax.tasks.losses import batch_weights
from tosa_jax.tasks.next_token.network import NextTokenTransformer, vocabulary_of
from tosa_jax.tasks.next_token.vocabulary import Vocabulary, shifted
from tosa_jax.tasks.prediction_writer import PredictionWriter
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
    check_unused,
    input_fields,
)


@dataclass(frozen=True, kw_only=True)
class NextTokenOptions:
    """Fields of the section `task`. Raises ConfigError for values out of range.

    labels_per_image  an update learns from at most so many labels of an image: of more, from random ones.
    top_p             the likeliest texts are predicted, as few as hold this share, in (0, 1], of the probability of all
                      that are written: of m labels each one's first token has a probability of 1/m at best.
    """

    labels_per_image: int = 8
    top_p: float = 0.7

    def __post_init__(self) -> None:
        check(self.labels_per_image >= 1,
              f"labels_per_image={self.labels_per_image} must be at least 1")  # fmt: skip
        check(0 < self.top_p <= 1, f"top_p={self.top_p} is not in (0, 1]")

    def predicted(self, shares: Scores) -> Bool[Array, "b k"]:
        """Which texts are predicted, of k with the probabilities `shares` [b k], the likeliest first."""
        before = jnp.cumsum(shares, axis=1) - shares
        return (before < self.top_p * shares.sum(axis=1, keepdims=True)) & (shares > 0)


class LabelWriter(ClassWriter):
    """Writes the labels that the model predicts, or with `--top` the texts of highest probability."""

    def guesses(self, prediction: Prediction) -> list[Guess]:
        texts, shares = (prediction.predictions[name][0] for name in ("text", "probability"))
        guesses = self.predictor.task.guesses(texts, shares)
        if self.args.top:
            return guesses[: self.args.top]
        shares = jnp.array([[guess.probability for guess in guesses]])
        count = int(self.predictor.task.choices.predicted(shares).sum())
        return guesses[:count]


@register("next_token")
@dataclass(frozen=True, kw_only=True)
class NextToken(Task):
    """Cross-entropy of the next token of each label. Batches hold `image` and `labels` uint8 [b classes], 1 or 0."""

    options: ClassVar[type] = NextTokenOptions
    model_class: ClassVar[type[VisionTransformer]] = NextTokenTransformer
    data_kind: ClassVar[str] = "label_sets"
    prediction_writer: ClassVar[type[PredictionWriter]] = LabelWriter
    best_metric: ClassVar[str] = "f1"

    vocabulary: Vocabulary
    choices: NextTokenOptions = NextTokenOptions()

    @classmethod
    def from_run(cls, run: RunSettings, stage: StageSettings) -> "NextToken":
        return cls.of_model(run.model, run.options, **input_fields(run))

    @classmethod
    def of_model(
        cls, config: Any, options: Any, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> "NextToken":
        return cls(vocabulary=vocabulary_of(config.labels), choices=options, mean=mean, std=std)

    @classmethod
    def check_run(cls, run: Any) -> None:
        vocabulary_of(run.model.labels)
        check_unused(run, ("label_smoothing", "mixup", "cutmix", "erase_prob", "distill_weight"))

    @classmethod
    def check_dataset(cls, run: Any, facts: Any) -> None:
        cls.check_kind(run, facts, "sets of labels")
        names = readable(facts.class_names)
        # Where programs are compiled without data, there are no names to compare.
        check(
            names in ((), run.model.labels),
            f"config.model.labels={run.model.labels}, but those of {run.data.name!r} are {names}: set it to them",
        )

    @classmethod
    def example(cls, config: Any) -> Batch:
        labels = jax.ShapeDtypeStruct((len(config.labels),), jnp.uint8)
        return {**super().example(config), "labels": labels}

    def training_batch(self, batch: Batch, key: jax.Array) -> Batch:
        """Normalised `image`, and of up to m labels an image, in random order:

        write   int32 [b m t], their tokens, and `read`, what the decoder reads to write them.
        counts  float32 [b m t], 1 for the tokens of labels and 0 for what fills the rows.
        weight  [b], so that each token of the batch counts as much.
        """
        labels = batch["labels"].astype(jnp.float32)
        most = min(self.choices.labels_per_image, labels.shape[1])
        # The image's own are above 1, and drawn among themselves.
        drawn, chosen = jax.lax.top_k(labels + jax.random.uniform(key, labels.shape), most)
        write = jnp.asarray(self.vocabulary.table)[chosen]
        counts = jnp.asarray(self.vocabulary.written)[chosen] & (drawn >= 1)[:, :, None]
        return {
            "image": self.inputs(batch["image"]),
            "read": shifted(write),
            "write": write,
            "counts": counts.astype(jnp.float32),
            "weight": batch_weights(counts.sum(axis=(1, 2))),
        }

    def training_loss(
        self,
        forward: Callable[..., Any],
        batch: Batch,
        keys: jax.Array,
        teacher: Callable[..., Any] | None,
        state: State,
    ) -> Loss:
        """As the base class, of a decoder that reads the true tokens before each one."""
        return super().training_loss(
            functools.partial(forward, text=batch["read"]), batch, keys, teacher, state
        )

    def loss(self, out: Output, batch: Batch) -> PerExample:
        """Cross-entropy in nats, the mean over an image's tokens times `weight`; 0 for an image without labels."""
        shares = jax.nn.log_softmax(out.predictions["next"])
        chosen = jnp.take_along_axis(shares, batch["write"][..., None], axis=3)[..., 0]
        counts = batch["counts"]
        total = -(chosen * counts).sum(axis=(1, 2))
        return batch["weight"] * total / jnp.maximum(counts.sum(axis=(1, 2)), 1)

    def metrics(self, out: Output, batch: Batch) -> dict[str, PerExample]:
        """`set_scores` of the texts that one-shot sampling wrote.

        A text is right if it is one of the image's labels, character by character. Texts that were written twice count
        once, and those without an end not at all. They are predicted as `NextTokenOptions.top_p` says.
        """
        shares = out.predictions["probability"]
        names, same = jax.vmap(self.vocabulary.label_of)(out.predictions["text"])
        k = shares.shape[1]
        before = jnp.tril(jnp.ones((k, k), bool), -1)[None]
        counts = (shares > 0) & ~(same & before).any(axis=2)
        place = jnp.where(counts, jnp.cumsum(counts, axis=1) - 1, k)
        taken = self.choices.predicted(jnp.where(counts, shares, 0))
        right = (names & (batch["labels"] > 0)[:, None]).any(axis=2) & counts
        return set_scores(right, taken, place, batch["labels"])

    def guesses(self, texts: np.ndarray, shares: np.ndarray) -> list[Guess]:
        """What one-shot sampling wrote for an image, [k t] and [k]: each text once, the most probable first.

        A text that is none of the labels has None for one.
        """
        found: dict[str, Guess] = {}
        labels = self.vocabulary.labels
        for tokens, share in zip(texts, shares, strict=True):
            text = self.vocabulary.text(tokens)
            if text is not None and text not in found:
                label = labels.index(text) if text in labels else None
                found[text] = Guess(label, text, float(share))
        return list(found.values())

    def pictures(
        self, batch: HostBatch, out: Output, config: ViTConfig, class_names: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        parts = zip(out.predictions["text"], out.predictions["probability"], strict=True)
        best = [self.guesses(texts, shares) for texts, shares in parts]
        return draw_labelled(batch, out, config, [row[0].name if row else "" for row in best])
