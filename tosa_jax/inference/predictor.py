"""A trained network at work: uint8 images in, logits or depth and selected tokens out, at batch sizes compiled once."""

import functools
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from tosa_jax.data.class_names import default_names
from tosa_jax.data.decoding import Preprocess
from tosa_jax.distributed.memory import check_fits
from tosa_jax.inference import sources
from tosa_jax.inference.predictions import Guess, Prediction, by_shape, split_batch
from tosa_jax.inference.sources import IMAGENET_MEAN, IMAGENET_STD, KeepRate, Say
from tosa_jax.models.factory import with_image_size
from tosa_jax.models.params import Params, set_params, split
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.tasks import TASKS

Picture = str | Path | bytes | np.ndarray | Image.Image
"""A path, encoded bytes, uint8 [height width 1 or 3], or PIL's."""


class Predictor:
    """Runs a network on any number of images; threads may share it.

    Programs are compiled for `batch_sizes` alone, each at its first use (or by `warm_up`); a batch of another size
    is split and padded to them. A network that takes images of any size, as for depth, compiles them for each size that
    comes, and 1 is always among them: few pictures may have that size.

    Made by `from_workdir`, `from_pretrained` or `from_weights`, or of a model:

    >>> model = tosa_jax.create_model("vit", image_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2,
    ...     num_classes=3, keep_rate=0.5, rngs=nnx.Rngs(0))
    >>> predictor = tosa_jax.Predictor(model, class_names=("cat", "dog", "owl"), batch_sizes=(1, 4))
    >>> out = predictor(np.zeros((6, 8, 8, 3), np.uint8))
    >>> out.logits.shape, [chosen.shape for chosen in out.selected]
    ((6, 3), [(6, 3)])

    Args:
        model: the network; its parameters stay where they are, on one device.
        form: how pictures become arrays; None: DeiT's evaluation, or as they are where any size will do.
        mean, std: of each channel's pixels in [0, 1], as in training.
        options: the task's own fields, `tasks.depth.DepthOptions` for depth; None: their defaults.
        class_names: one a class; None: ImageNet's for 1000 classes, else numbers.
        batch_sizes: the sizes to compile.

    Raises ConfigError: no batch size, one below 1, or another number of names than of classes.
    """

    def __init__(
        self,
        model: VisionTransformer,
        *,
        form: Preprocess | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        options: Any = None,
        class_names: Sequence[str] | None = None,
        batch_sizes: Sequence[int] = (1, 8, 64),
    ) -> None:
        config = model.config
        check(len(batch_sizes) > 0 and min(batch_sizes) >= 1,
              f"batch_sizes={tuple(batch_sizes)} must be numbers of at least 1")  # fmt: skip
        num_classes = 0 if "num_classes" in config.unused else config.num_classes
        names = tuple(default_names(num_classes) if class_names is None else class_names)
        check(len(names) == num_classes,
              f"{len(names)} class names, but the network has {num_classes} classes")  # fmt: skip
        mean, std = (_a_channel(values, config.in_chans) for values in (mean, std))
        self.config: ViTConfig = config
        self.form = form or sources.preprocess_of("", config)
        self.class_names = names
        self.batch_sizes = tuple(sorted({*batch_sizes, *([1] if config.resizes else [])}))
        self.options = TASKS[config.task].options() if options is None else options
        self.task = TASKS[config.task].of_network(config, self.options, mean=mean, std=std)
        self._graphdef, self._params = split(model)
        self._programs: dict[tuple[int, int, int], jax.stages.Compiled] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_workdir(
        cls,
        workdir: str | Path,
        *,
        keep_rate: KeepRate = None,
        on_message: Say = print,
        **options: Any,
    ) -> "Predictor":
        """The network that a run left in its work directory, with the run's preprocessing and class names.

        keep_rate   another static budget for the same weights, in (0, 1]: one share, or one a selection.
        on_message  is told, a line each, what did not go over as it was.
        options     of `Predictor`.

        Raises WorkdirError (not a work directory), WeightsError (no checkpoint yet), ConfigError (`keep_rate`).
        """
        found = sources.from_workdir(Path(workdir).expanduser(), keep_rate, on_message)
        return cls(**(found | options))

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        weights: str | Path,
        *,
        selectors: str | Path | None = None,
        keep_rate: KeepRate = None,
        class_names: Sequence[str] | None = None,
        on_message: Say = print,
        **fields: Any,
    ) -> "Predictor":
        """A released network: timm's name and a file that `load_pretrained` reads.

        Without `selectors` and `keep_rate` it runs densely; with selectors alone at the budget .5. Pictures go
        through the evaluation that the weights were published with (`sources.preprocess_of`).

        selectors    a file of `save_selectors`; without one, layers choose by the map of the layer before them.
        class_names  one a class; sets `num_classes`.
        fields       any field of the network's configuration, `task` ("depth"), and the options of `Predictor`.

        Raises ConfigError (unknown name or field), WeightsError (missing, damaged or other weights).
        """
        own = {"form", "mean", "std", "options", "batch_sizes"} & fields.keys()
        options = {option: fields.pop(option) for option in own}
        found = sources.from_pretrained(
            name, weights, selectors, keep_rate, class_names, on_message, **fields
        )
        return cls(**(found | options))

    @classmethod
    def from_weights(
        cls,
        path: str | Path,
        *,
        keep_rate: KeepRate = None,
        on_message: Say = print,
        **options: Any,
    ) -> "Predictor":
        """What `save` wrote. Raises WeightsError for other files of weights: they do not say of which network."""
        return cls(**(sources.from_weights(path, keep_rate, on_message) | options))

    def save(self, path: str | Path) -> None:
        """Writes network, preprocessing and class names to one `.safetensors` file, for `from_weights`."""
        sources.save(
            sources.Network(
                model=set_params(self._graphdef, self._params),
                form=self.form,
                mean=self.task.mean,
                std=self.task.std,
                options=self.options,
                class_names=self.class_names,
            ),
            path,
        )

    def prepare(self, image: Picture) -> np.ndarray:
        """A picture of any size as the network takes it: uint8 [s s c]; for depth [height width c], of its own size.

        Raises BadImageError (a ValueError): no image, or cut short; OSError: no such file.
        """
        if isinstance(image, str | Path):
            image = Path(image).expanduser().read_bytes()
        if isinstance(image, bytes):
            return self.form.decode(image)
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        return self.form.fit(image.convert("L" if self.form.channels == 1 else "RGB"))

    def __call__(self, images: np.ndarray) -> Prediction:
        """images uint8 [b height width c] from `prepare`, b >= 0 -> a `Prediction` of as many rows.

        Raises ConfigError (another dtype or shape), DeviceError (a compiled batch size does not fit the device).
        """
        images = np.asarray(images)
        self._check(images)
        shape = images.shape[1:]
        if not len(images):
            return _rows(self(np.zeros((1, *shape), np.uint8)), slice(0))
        parts, start = [], 0
        for size in split_batch(len(images), self.batch_sizes):
            part = images[start : start + size]
            padded = np.concatenate([part, np.zeros((size - len(part), *shape), np.uint8)])
            parts.append((len(part), self.program(size, shape[:2])(self._params, padded)))
            start += size
        parts = [_rows(out, slice(n)) for n, out in jax.device_get(parts)]
        return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)

    def each(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """Images uint8 [height width c] of whatever sizes -> a `Prediction` of one row for each.

        Those of one size go through the network together. Same errors.
        """
        found: dict[int, Prediction] = {}
        for places in by_shape(images):
            out = self(np.stack([images[place] for place in places]))
            found |= {place: _rows(out, slice(i, i + 1)) for i, place in enumerate(places)}
        return [found[place] for place in range(len(images))]

    def top(self, prediction: Prediction, k: int = 5) -> list[list[Guess]]:
        """The `k` likeliest classes of each image, the likeliest first; all where there are fewer.

        Raises ConfigError if the network has no classes.
        """
        self._check_task("classification", "classes", "depth")
        rows = []
        for row in prediction.probabilities:
            best = np.argsort(-row, kind="stable")[:k]
            rows.append([Guess(int(i), self.class_names[i], float(row[i])) for i in best])
        return rows

    def classify(self, images: Iterable[Picture], k: int = 5) -> list[list[Guess]]:
        """`prepare`, the network and `top` in one call, with their errors."""
        self._check_task("classification", "classes", "depth")
        return self.top(self(np.stack([self.prepare(image) for image in images])), k)

    def depth(self, images: Iterable[Picture]) -> list[np.ndarray]:
        """`prepare` and the network in one call: float32 [height width] in metres of each picture, at its own size.

        Raises ConfigError if the network does not predict depth.
        """
        self._check_task("depth", "depth", "classify")
        return [out.depth[0] for out in self.each([self.prepare(image) for image in images])]

    @functools.cached_property
    def num_selections(self) -> int:
        """How many times the network selects tokens; 0: it runs densely."""
        images = self._abstract_images(1, self.config.image_shape)
        return len(jax.eval_shape(self._run, self._params, images).selected)

    def warm_up(self) -> None:
        """Compiles every batch size now, so that no first call waits for it; for images of the network's own size."""
        for size in self.batch_sizes:
            self.program(size)

    def program(
        self, batch_size: int, image_size: tuple[int, int] | None = None
    ) -> jax.stages.Compiled:
        """The compiled program `(params, images) -> Prediction` of a batch size.

        image_size  height and width, where not the network's own.

        Raises DeviceError: it does not fit the device.
        """
        size = image_size or self.config.image_shape
        with self._lock:
            if (batch_size, *size) not in self._programs:
                images = self._abstract_images(batch_size, size)
                program = jax.jit(self._run).lower(self._params, images).compile()
                check_fits(
                    program,
                    f"a batch of {batch_size} images of {size[0]}x{size[1]} pixels",
                    "take a smaller --batch_size (batch_sizes)"
                    + (", or smaller images" if self.config.resizes else ""),
                )
                self._programs[batch_size, *size] = program
            return self._programs[batch_size, *size]

    def _abstract_images(self, batch_size: int, size: tuple[int, int]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *size, self.config.in_chans), np.uint8)

    def _run(self, params: Params, images: jax.Array) -> Prediction:
        network = with_image_size(set_params(self._graphdef, params), images.shape[1:3])
        # The key is for random selection, which then draws the same each time.
        out = self.task.predict(network, images, jax.random.key(0))
        logits, depth = jax.tree.map(lambda x: x.astype(np.float32), (out.logits, out.depth))
        return Prediction(logits, out.selected, out.scores, depth)

    def _check(self, images: np.ndarray) -> None:
        config = self.config
        size = ("height", "width") if config.resizes else config.image_shape
        fits = images.ndim == 4 and images.shape[3] == config.in_chans and min(images.shape[1:]) > 0
        check(images.dtype == np.uint8 and fits and (config.resizes or images.shape[1:3] == size),
              f"images are {images.dtype} {list(images.shape)}, but must be uint8 [b, {size[0]}, {size[1]}, "
              f"{config.in_chans}]: Predictor.prepare makes them")  # fmt: skip

    def _check_task(self, task: str, what: str, instead: str) -> None:
        check(self.config.task == task,
              f"this network is for {self.config.task} and has no {what}: call Predictor.{instead}")  # fmt: skip


def _rows(prediction: Prediction, rows: slice) -> Prediction:
    return jax.tree.map(lambda x: x[rows], prediction)


def _a_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value a channel; one given serves all."""
    values = tuple(values) * (channels if len(values) == 1 else 1)
    check(
        len(values) == channels,
        f"mean and std {values} are not one value for each of {channels} channels",
    )
    return values
