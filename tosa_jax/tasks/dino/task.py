"""Pretraining without labels: DINO (Caron et al. 2021, arXiv 2104.14294), and DenseDINO (arXiv 2306.04654).

A student sees crops of an image, large and small; a teacher, its moving average, the large ones. Each output of the
student learns the teacher's for another crop, which is centred (a running mean is taken off) and sharpened (a low
temperature). DenseDINO adds points that two crops share: a reference token at a point learns the teacher's at the same
point of the other crop. Plain DINO is the same without them (`config.model.reference_points=0`).

Sources: facebookresearch/dino, `main_dino.py`; yyk-wew/DenseDINO, `main_dino.py`. Not as there: weight decay is
constant; there is no blur, and jitter has no hue; the last layer learns from the first step on; a centre is the mean
of all outputs until its momentum takes over, where the published one starts at 0; the head's weights start by their
width; the centre of the reference tokens is the mean over points that the two large crops share; position codes at
points are bilinear.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tosa_jax.errors import ConfigError
from tosa_jax.models.layers import fold_key
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.ops.array_types import Images, PerExample
from tosa_jax.tasks.dino.crops import cut, draw_boxes, jitter, seen_in, shared_points
from tosa_jax.tasks.dino.network import DinoTransformer
from tosa_jax.tasks.dino.scores import nearest_neighbours, ridge_classes
from tosa_jax.tasks.registry import register
from tosa_jax.tasks.task import (
    AverageTeacher,
    Batch,
    Loss,
    RunSettings,
    SplitOutputs,
    StageSettings,
    State,
    Task,
    check_unused,
    input_fields,
)

GLOBAL = 2
"""Large crops of an image, which the teacher sees."""


@dataclass(frozen=True, kw_only=True)
class DinoOptions:
    """Crops, temperatures, averages. Raises ConfigError for values out of range.

    local_crops          small crops of an image; 0: none.
    local_size           their side, pixels: a multiple of the patch.
    global_scale         least and largest area of a large crop, shares of the image.
    local_scale          those of a small one.
    flip                 mirror half of the crops.
    jitter_strength      brightness and contrast are multiplied by 1 +- this.
    solarise             probability that bright pixels of the second large crop are inverted.
    student_temperature  of the student's outputs.
    teacher_temperature  of the teacher's, at the end.
    warmup_teacher_temperature
                         the same at the start.
    warmup_teacher_steps updates in which it goes from one to the other; 0: it starts at the end.
    centre_momentum      what the centre keeps in an update, in [0, 1]; less in the first updates, of whose outputs it
                         is the mean.
    momentum             what the teacher keeps in the first update; it rises to 1 along a cosine.
    reference_weight     share in [0, 1] of the reference tokens in the loss.
    """

    local_crops: int = 4
    local_size: int = 96
    global_scale: tuple[float, ...] = (0.4, 1.0)
    local_scale: tuple[float, ...] = (0.05, 0.4)
    flip: bool = True
    jitter_strength: float = 0.4
    solarise: float = 0.2
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    warmup_teacher_temperature: float = 0.04
    warmup_teacher_steps: int = 0
    centre_momentum: float = 0.9
    momentum: float = 0.996
    reference_weight: float = 0.5

    def __post_init__(self) -> None:
        for name in ("global_scale", "local_scale"):
            scale = getattr(self, name)
            check(len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1,
                  f"{name}={scale} must be two shares in (0, 1], ascending")  # fmt: skip
        for name in ("student", "teacher", "warmup_teacher"):
            value = getattr(self, f"{name}_temperature")
            check(value > 0, f"{name}_temperature={value} must be above 0")
        for name in ("solarise", "centre_momentum", "momentum", "reference_weight"):
            check(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} is not in [0, 1]")
        check(0 <= self.jitter_strength <= 1, f"jitter_strength={self.jitter_strength} is not in [0, 1]")  # fmt: skip
        for name in ("local_crops", "warmup_teacher_steps"):
            check(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative")


class Views(NamedTuple):
    """The crops of a batch, for all crops c = 2 + local: `boxes` [b c 4] and `flips` [b c]."""

    boxes: Float[Array, "b c 4"]
    flips: Float[Array, "b c"]


@register("dino")
@dataclass(frozen=True, kw_only=True)
class Dino(Task):
    """The loss is the cross-entropy of the student's outputs against the teacher's, mean over all pairs of crops.

    size        of the large crops, (height, width) in pixels: those of the model's images.
    points      reference tokens for each pair of crops.
    prototypes  outputs of the head.
    """

    options: ClassVar[type] = DinoOptions
    model_class: ClassVar[type[VisionTransformer]] = DinoTransformer
    best_metric: ClassVar[str] = "knn"

    choices: DinoOptions
    size: tuple[int, int]
    points: int
    prototypes: int

    @classmethod
    def from_run(cls, run: RunSettings, stage: StageSettings) -> "Dino":
        fields: dict[str, Any] = _of_model(run.model) | input_fields(run)
        return cls(choices=run.options, **fields)

    @classmethod
    def of_model(
        cls, config: ViTConfig, options: Any, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> "Dino":
        return cls(choices=options, **_of_model(config), mean=mean, std=std)

    @classmethod
    def check_run(cls, run: Any) -> None:
        patch, side = run.model.patch_size, run.options.local_size
        check(not run.options.local_crops or side % patch == 0 and side > 0,
              f"config.task.local_size={side} is not a multiple of the patch, {patch} pixels")  # fmt: skip
        check_unused(run, ("label_smoothing", "mixup", "cutmix", "erase_prob", "distill_weight"))

    @classmethod
    def check_dataset(cls, run: RunSettings, facts: Any) -> None:
        if facts.kind != cls.data_kind:
            raise ConfigError(
                f"config.data.name={run.data.name!r} has no single class an image: the scores of 'dino' need "
                "one, not its training"
            )

    @classmethod
    def example(cls, config: ViTConfig) -> Batch:
        return {**super().example(config), "label": jax.ShapeDtypeStruct((), jnp.int32)}

    @property
    def teacher(self) -> AverageTeacher:
        return AverageTeacher(functools.partial(momentum_at, self.choices.momentum))

    def init_state(self) -> State:
        """The centres [k], of class tokens and of reference tokens, and the number of updates."""
        state = {"centre": jnp.zeros(self.prototypes), "updates": jnp.zeros((), jnp.int32)}
        return state | ({"reference_centre": jnp.zeros(self.prototypes)} if self.points else {})

    def update_state(self, state: State, statistics: Any) -> State:
        updates = state["updates"]
        kept = jnp.minimum(self.choices.centre_momentum, updates / (updates + 1))
        centres = {
            name: kept * state[name] + (1 - kept) * mean for name, mean in statistics.items()
        }
        return {**state, **centres, "updates": updates + 1}

    def training_batch(self, batch: Batch, key: jax.Array) -> Batch:
        """`large` [b 2 height width c] and `small` [b local side side c], normalised crops. With reference tokens also

        teacher_points  [b 2 c r 2]: for each large crop, the points that it shares with each crop, as it sees them.
        student_points  [b c 2 r 2]: the same points as the other crop sees them.
        shared          [b 2 c]: 1 for pairs of different crops that share anything, else 0.
        """
        images = batch["image"].astype(jnp.float32) / 255
        views = self.views(len(images), jax.random.fold_in(key, 0))
        side = self.choices.local_size
        solarise = (0.0, self.choices.solarise)
        found = {"large": self.seen(images, views, 0, self.size, solarise, key)}
        if local := self.choices.local_crops:
            found["small"] = self.seen(images, views, GLOBAL, (side, side), (0.0,) * local, key)
        if self.points:
            found |= self.pairs(views, jax.random.fold_in(key, 1))
        return found

    def views(self, count: int, key: jax.Array) -> Views:
        """Draws boxes and flips.

        The two large crops share at least two hundredths of the image, a small one and each large one a hundredth.
        """
        choices = self.choices
        keys = jax.random.split(key, 4)
        scale, small_scale = ((s[0], s[1]) for s in (choices.global_scale, choices.local_scale))
        one = draw_boxes(keys[0], (count, 1), scale)
        two = draw_boxes(keys[1], (count, 1), scale, (one,), 0.02)
        shape = (count, choices.local_crops)
        boxes = [one, two, draw_boxes(keys[2], shape, small_scale, (one, two), 0.01)]
        flips = jax.random.bernoulli(keys[3], 0.5, (count, GLOBAL + choices.local_crops))
        return Views(jnp.concatenate(boxes, axis=1), flips.astype(jnp.float32) * choices.flip)

    def seen(
        self,
        images: Images,
        views: Views,
        first: int,
        size: tuple[int, int],
        solarise: tuple[float, ...],
        key: jax.Array,
    ) -> Float[Array, "b m rows columns c"]:
        """The crops from number `first` on, of `size` pixels, one for each of `solarise`, jittered and normalised."""
        b, m = len(images), len(solarise)
        of = slice(first, first + m)
        several = jax.vmap(cut, in_axes=(None, 1, None, 1), out_axes=1)
        crops = several(images, views.boxes[:, of], size, views.flips[:, of])
        rows = crops.reshape(b * m, *crops.shape[2:])
        chance = jnp.tile(jnp.asarray(solarise), b)
        own = jax.random.fold_in(key, 2 + first)
        changed = jitter(own, rows, self.choices.jitter_strength, chance)
        return self.normalised(changed).reshape(crops.shape)

    def pairs(self, views: Views, key: jax.Array) -> dict[str, jax.Array]:
        """The points of each pair of a large crop and any crop, as `training_batch` gives them."""
        large, every = views.boxes[:, :GLOBAL, None], views.boxes[:, None]
        points, shared = shared_points(key, self.points, *jnp.broadcast_arrays(large, every))
        learnt = seen_in(points, every, views.flips[:, None])
        return {
            "teacher_points": seen_in(points, large, views.flips[:, :GLOBAL, None]),
            "student_points": learnt.swapaxes(1, 2),
            "shared": shared * (1 - jnp.eye(GLOBAL, shared.shape[2]))[None],
        }

    def training_loss(
        self,
        forward: Callable[..., Any],
        batch: Batch,
        keys: jax.Array,
        teacher: Callable[..., Any] | None,
        state: State,
    ) -> Loss:
        assert teacher is not None
        taught = look(teacher, batch["large"], batch.get("teacher_points"), None)
        at = batch.get("student_points")
        learnt = [look(forward, batch["large"], None if at is None else at[:, :GLOBAL], keys)]
        if "small" in batch:
            small = None if at is None else at[:, GLOBAL:]
            learnt.append(look(forward, batch["small"], small, fold_key(keys, 1)))
        learnt = {k: jnp.concatenate([x[k] for x in learnt], axis=1) for k in learnt[0]}
        layer_losses = learnt.pop("layer_losses").mean(axis=1)

        temperature = self.temperature(state)
        targets = sharpened(taught["prototypes"], state["centre"], temperature)
        logits = learnt["prototypes"] / self.choices.student_temperature
        crops = logits.shape[1]
        different = 1 - jnp.eye(GLOBAL, crops)
        apart = cross_entropy(targets[:, :, None], logits[:, None])
        values = (apart * different[None]).sum(axis=(1, 2)) / different.sum()
        statistics = {"centre": taught["prototypes"].mean(axis=(0, 1))}
        if at is not None:
            r = at.shape[3]
            outputs = taught["reference"].reshape(len(values), GLOBAL, crops, r, -1)
            targets = sharpened(outputs, state["reference_centre"], temperature)
            logits = learnt["reference"].reshape(len(values), crops, GLOBAL, r, -1).swapaxes(1, 2)
            logits = logits / self.choices.student_temperature
            apart = cross_entropy(targets, logits).mean(axis=3) * batch["shared"]
            weight = self.choices.reference_weight
            values = (1 - weight) * values + weight * apart.sum(axis=(1, 2)) / different.sum()
            between = jnp.stack([outputs[:, 0, 1], outputs[:, 1, 0]])
            statistics["reference_centre"] = between.mean(axis=(0, 1, 2))
        return Loss(values + layer_losses, statistics)

    def temperature(self, state: State) -> jax.Array:
        """The teacher's, which rises linearly at the start."""
        choices = self.choices
        start, end = choices.warmup_teacher_temperature, choices.teacher_temperature
        done = state["updates"] / max(choices.warmup_teacher_steps, 1)
        if not choices.warmup_teacher_steps:
            return jnp.asarray(end)
        return jnp.where(done < 1, start + (end - start) * done, end)

    def predict(self, model: Callable[..., Any], batch: Batch, key: jax.Array) -> Any:
        """The output with `features` [b d], and `confidence` [b] the largest share of a prototype at the student's
        temperature."""
        out = model(self.inputs(batch["image"]), key=key)
        shares = jax.nn.softmax(out.predictions["prototypes"] / self.choices.student_temperature)
        found = {"features": out.features, "confidence": shares.max(axis=1)}
        return out._replace(predictions=found)

    def metrics(self, out: Any, batch: Batch) -> dict[str, PerExample]:
        """`confidence`, which is 1 or 1 / k where training has collapsed."""
        return {"confidence": out.predictions["confidence"]}

    def split_metrics(self, outputs: SplitOutputs) -> dict[str, float]:
        """Accuracies on frozen features with the labels of the training split: `knn`, 20 neighbours as in DINO, and
        `linear`, the best of ridge classifiers."""
        splits = []
        for split in ("train", "eval"):
            parts = [(out.features, batch["label"]) for batch, out in outputs(split)]
            splits.append(tuple(np.concatenate(x) for x in zip(*parts, strict=True)))
        (train, known), (test, wanted) = splits
        return {
            "knn": float((nearest_neighbours(train, known, test) == wanted).mean()),
            "linear": float((ridge_classes(train, known, test) == wanted).mean()),
        }


def _of_model(config: Any) -> dict[str, Any]:
    return {
        "size": config.image_shape,
        "points": config.reference_points,
        "prototypes": config.prototypes,
    }


def momentum_at(start: float, step: jax.Array, total: int) -> jax.Array:
    """The teacher's momentum: from `start` to 1 along a cosine over the stage."""
    return 1 - (1 - start) * (1 + jnp.cos(jnp.pi * step / total)) / 2


def look(
    model: Callable[..., Any], crops: jax.Array, points: jax.Array | None, keys: jax.Array | None
) -> dict[str, jax.Array]:
    """What a model gives for crops [b m height width c] of one size: `prototypes` [b m k], `layer_losses` [b m], and
    with points [b m p r 2] `reference` [b m p*r k]."""
    b, m = crops.shape[:2]
    fields = {}
    if keys is not None:
        each = jax.vmap(lambda key: jax.random.split(key, m))(keys)
        fields["key"] = each.reshape(b * m)
    at = None if points is None else points.reshape(b * m, -1, 2)
    out = model(crops.reshape(b * m, *crops.shape[2:]), at, **fields)
    found = {k: v for k, v in out.predictions.items() if k in ("prototypes", "reference")}
    found["layer_losses"] = jnp.broadcast_to(out.layer_losses, b * m)
    return {k: v.reshape(b, m, *v.shape[1:]) for k, v in found.items()}


def sharpened(outputs: jax.Array, centre: jax.Array, temperature: jax.Array) -> jax.Array:
    """The teacher's distributions: its outputs [... k] without the centre [k], at its temperature."""
    centre = centre.reshape((1,) * (outputs.ndim - 1) + (-1,))
    return jax.lax.stop_gradient(jax.nn.softmax((outputs - centre) / temperature, axis=-1))


def cross_entropy(targets: jax.Array, logits: jax.Array) -> jax.Array:
    """In nats, over the last axis; the others broadcast."""
    return -(targets * jax.nn.log_softmax(logits, axis=-1)).sum(axis=-1)
