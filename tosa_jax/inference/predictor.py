"""`Predictor`: a model with its preprocessing, for any number of images."""

import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from tosa_jax.data.class_names import default_names
from tosa_jax.data.decoding import Preprocess
from tosa_jax.distributed.devices import check_dtype
from tosa_jax.distributed.memory import check_fits
from tosa_jax.distributed.messages import say
from tosa_jax.inference import loading
from tosa_jax.inference.batches import checked_sizes, rows_of, split_batch
from tosa_jax.inference.loading import KeepRate, OnMessage
from tosa_jax.inference.pictures import Picture, open_picture
from tosa_jax.inference.sizes import Size, checked_program_sizes, each_at, several_sizes
from tosa_jax.models import naflex
from tosa_jax.models.factory import with_image_size
from tosa_jax.models.params import Params, set_params, split
from tosa_jax.models.vit import Output, VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, are_many, check, plain_value
from tosa_jax.models.weights.load import Weights
from tosa_jax.models.weights.preprocessing import Preprocessing
from tosa_jax.tasks import TASKS
from tosa_jax.tasks.predictions import Guess, Prediction, check_finite

KEPT_PROGRAMS = 8
"""Compiled programs that a predictor of images of any size keeps, one for each batch size and image size (about 12 MB
each), or all those of its `program_sizes`. The one that was not used for longest is let go."""


class Predictor:
    """Runs a model on any number of images. Several threads may use one predictor.

    Programs are compiled only for `batch_sizes`, each at its first use or by `warm_up`. Other batches are split and
    padded to these sizes. A model that accepts images of any size, such as a depth model, compiles a program for each
    image size that occurs, or for a few (`program_sizes`), and then also for batch size 1. One with `max_patches` takes
    images of all proportions in the same batch, by one program a batch size.

    `from_workdir`, `from_pretrained` and `from_weights` load a model; a model in memory works too:

    >>> model = tosa_jax.create_model("vit", image_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2,
    ...     num_classes=3, keep_rate=0.5, rngs=nnx.Rngs(0))
    >>> predictor = tosa_jax.Predictor(model, class_names=("cat", "dog", "owl"), batch_sizes=(1, 4))
    >>> out = predictor(np.zeros((6, 8, 8, 3), np.uint8))
    >>> out.logits.shape, [chosen.shape for chosen in out.selected]
    ((6, 3), [(6, 3)])

    Args:
        model: its parameters must be on one device, where they stay.
        form: how images become arrays; None: as `model.preprocessing` says, else as in DeiT's evaluation, or unchanged
            if the model accepts any size.
        mean, std: of each channel's pixels in [0, 1], as in training: a number, or one a channel; None: as
            `model.preprocessing` says, else ImageNet's.
        options: the task's options, for example `DepthOptions`; None: their defaults.
        task: a key of `TASKS`; None: the one that such models are for.
        class_names: one a class; None: ImageNet's for 1000 classes, else numbers.
        batch_sizes: batch sizes to compile programs for.
        program_sizes: image sizes (height, width) to compile programs for, of a model that accepts any. `each` and
            `depth` run a picture at the one that suits it best (`best_size`), and resize the result back. (): each
            picture runs at its own size. A call runs at the size that its images have.

    Raises ConfigError if `batch_sizes` is empty or has one below 1, if there are not as many names as classes, or for
    `program_sizes` of a model that does not accept any size.
    """

    def __init__(
        self,
        model: VisionTransformer,
        *,
        form: Preprocess | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        options: Any = None,
        task: str | None = None,
        class_names: Sequence[str] | None = None,
        batch_sizes: Sequence[int] = (1, 8, 64),
        program_sizes: Sequence[int | Size] = (),
    ) -> None:
        config = model.config
        batch_sizes = checked_sizes(batch_sizes)
        check_dtype("dtype", config.dtype)
        num_classes = 0 if "num_classes" in config.unused else config.num_classes
        names = tuple(default_names(num_classes) if class_names is None else class_names)
        check(
            len(names) == num_classes,
            f"{len(names)} class names, but the model has {num_classes} classes",
        )
        known = model.preprocessing or Preprocessing()
        mean, std = (
            _a_channel(name, getattr(known, name) if given is None else given, config.in_chans)
            for name, given in (("mean", mean), ("std", std))
        )
        self.config: ViTConfig = config
        self.form = form or loading.form_of(config, known)
        self.class_names = names
        sizes = {1, *batch_sizes} if config.resizes else set(batch_sizes)
        self.batch_sizes: tuple[int, ...] = tuple(sorted(sizes))
        self.program_sizes = checked_program_sizes(program_sizes, config.resizes)
        self.task_name = task or config.task
        found = TASKS[self.task_name]
        self.options = found.options() if options is None else options
        self.task: Any = found.of_model(config, self.options, mean=mean, std=std)
        self._graphdef, self._params = split(model)
        self._programs: OrderedDict[tuple[int, int, int], jax.stages.Compiled] = OrderedDict()
        self._lock = threading.Lock()
        self._said_sizes = False

    def __getstate__(self) -> dict[str, Any]:
        """Everything but compiled programs, which belong to a process; parameters as NumPy arrays."""
        params = {name: np.asarray(x) for name, x in self._params.items()}
        return {**vars(self), "_params": params, "_programs": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._params = jax.device_put(state["_params"])
        self._lock = threading.Lock()

    @property
    def model(self) -> VisionTransformer:
        """The model, with the parameters that the predictor runs."""
        return set_params(self._graphdef, self._params)

    @classmethod
    def from_workdir(
        cls,
        workdir: str | Path,
        *,
        keep_rate: KeepRate = None,
        on_message: OnMessage = print,
        **fields: Any,
    ) -> "Predictor":
        """The model of a run, with the run's preprocessing and class names.

        workdir     the run's work directory.
        keep_rate   another keep rate for the same weights, in (0, 1]: one, or one a selection; None: the run's.
        on_message  receives one line for each part of the weights that was changed or left out.
        fields      of the configuration that differ from the run's, such as `plan`, and arguments of `Predictor`.

        Raises WorkdirError (not a work directory), WeightsError (no checkpoint yet), ConfigError (`keep_rate`, fields).
        """
        options, fields = _own_options(fields)
        folder = Path(workdir).expanduser()
        found = loading.from_workdir(folder, keep_rate, on_message, **fields)
        return cls(**{**found, **options})

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        weights: Weights,
        *,
        selectors: str | Path | None = None,
        keep_rate: KeepRate = None,
        class_names: Sequence[str] | None = None,
        on_message: OnMessage = print,
        **fields: Any,
    ) -> "Predictor":
        """A model with released weights.

        Without `selectors` and `keep_rate` the model is dense; with selectors alone its keep rate is .5. Images are
        preprocessed as the weights expect it (`models.weights.preprocessing.preprocessing_of`).

        name         the variant, by timm's name.
        weights      a file that `load_pretrained` reads.
        selectors    a file of `save_selectors`; None: tokens are selected by the attention map of the layer before.
        class_names  one a class; sets `num_classes`. None: as the file states them. Without `num_classes` in `fields`
                     the model has the classes of the file's head, or none.
        fields       fields of the model's configuration, `task` (for example "depth"), and arguments of `Predictor`.

        Raises ConfigError (unknown name or field), WeightsError (missing, damaged or other weights).
        """
        options, fields = _own_options(fields)
        found = loading.from_pretrained(
            name, weights, selectors, keep_rate, class_names, on_message, **fields
        )
        return cls(**{**found, **options})

    @classmethod
    def from_weights(
        cls,
        path: str | Path,
        *,
        keep_rate: KeepRate = None,
        on_message: OnMessage = print,
        **options: Any,
    ) -> "Predictor":
        """The model in a file of `save`. Raises WeightsError for other files: they have no model configuration."""
        return cls(**{**loading.from_weights(path, keep_rate, on_message), **options})

    def save(self, path: str | Path) -> None:
        """Writes the model, its preprocessing and class names to one `.safetensors` file, for `from_weights`."""
        loading.save(
            loading.LoadedModel(
                model=self.model,
                form=self.form,
                mean=self.task.mean,
                std=self.task.std,
                options=self.options,
                task=self.task_name,
                class_names=self.class_names,
            ),
            path,
        )

    def prepare(self, image: Picture) -> np.ndarray:
        """Makes an input array of a `Picture`: uint8 [s, s, c]; for a depth model [height, width, c] at its own size,
        and for a model with `max_patches` in its own proportion, of whole patches.

        Raises BadImageError (a ValueError) if it is no image or incomplete, OSError if the file cannot be read,
        ConfigError if the model takes neither grey nor RGB images.
        """
        channels = self.form.channels
        check(
            channels in (1, 3),
            f"images are grey or RGB, but the model takes {channels} channels: call the predictor with arrays, uint8 "
            f"[b, height, width, {channels}]",
        )
        opened = open_picture(image, channels=channels, exif_rotate=self.form.exif_rotate)
        return self.form.fit(opened)

    def __call__(self, images: np.ndarray) -> Prediction:
        """Runs the model on images, uint8 [b, height, width, c] as from `prepare`; b may be 0.

        Returns a `Prediction` of b rows.

        Raises ConfigError (another dtype or shape), DeviceError (a batch size does not fit the device).
        """
        images = np.asarray(images)
        self._check(images)
        if not len(images):
            return rows_of(self(np.zeros((1, *images.shape[1:]), np.uint8)), slice(0))
        if self.config.max_patches:
            return self._in_batches(*naflex.to_strips(list(images), self.config))
        return self._in_batches(images)

    def _in_batches(self, *arrays: np.ndarray) -> Prediction:
        """The rows of arrays, which belong together, through the programs of the batch sizes."""
        parts, count, start = [], len(arrays[0]), 0
        for size in split_batch(count, self.batch_sizes):
            places = np.minimum(np.arange(start, start + size), count - 1)  # the last row pads
            program = self.program(size, arrays[0].shape[1:3])
            out = program(self._params, *(x[places] for x in arrays))
            parts.append((min(size, count - start), out))
            start += size
        parts = [rows_of(out, slice(n)) for n, out in jax.device_get(parts)]
        return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)

    def each(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """Runs the model on images of different sizes, each uint8 [height, width, c]; those of one size in one batch,
        and all in one with `max_patches`. With `program_sizes` they run at these, and `Prediction.selected` is of the
        patches there.

        Returns a `Prediction` of one row for each image, at the image's own size. Raises the errors of a call.
        """
        for image in images:
            self._check(np.asarray(image)[None])
        if self.config.max_patches and len(images):
            out = self._in_batches(*naflex.to_strips(images, self.config))
            return [rows_of(out, slice(i, i + 1)) for i in range(len(images))]
        return each_at(self, images, self.program_sizes)

    def top(self, prediction: Prediction, k: int = 5) -> list[list[Guess]]:
        """The `k` classes of highest probability for each image, highest first; fewer if the model has fewer.

        Raises ConfigError if the model is not a classifier, or has no head, NonFiniteOutputError if it gives NaN.
        """
        self._check_classes()
        k = plain_value("k", k, int)
        check(k >= 1, f"k={k} must be at least 1")
        check_finite(prediction)
        rows = []
        for row in prediction.probabilities:
            best = np.argsort(-row, kind="stable")[:k]
            rows.append([Guess(int(i), self.class_names[i], float(row[i])) for i in best])
        return rows

    def classify(self, images: Iterable[Picture], k: int = 5) -> list[list[Guess]]:
        """The `k` classes of highest probability for each image: `prepare`, a call and `top`, with their errors."""
        self._check_classes()
        predictions = self.each([self.prepare(image) for image in _several(images)])
        return [self.top(out, k)[0] for out in predictions]

    def depth(self, images: Iterable[Picture]) -> list[np.ndarray]:
        """The depth of each image at its own size, float32 [height, width] as `Output.depth`: `prepare` and `each`.

        Raises ConfigError if the model does not predict depth, and the errors of `prepare` and of a call.
        """
        self._check_task("depth", "depth")
        predictions = self.each([self.prepare(image) for image in _several(images)])
        for out in predictions:
            check_finite(out)
        return [out.depth[0] for out in predictions if out.depth is not None]

    @functools.cached_property
    def num_selections(self) -> int:
        """Number of times the model selects tokens; 0: it is dense."""
        arrays = self._abstract_arrays(1, self._own_shape)
        return len(jax.eval_shape(self._run, self._params, *arrays).selected)

    def warm_up(self) -> None:
        """Compiles the programs of all batch sizes, for images of `program_sizes`, or of the model's own size."""
        for size in self.program_sizes or (self._own_shape,):
            for batch_size in self.batch_sizes:
                self.program(batch_size, size)

    def program(
        self, batch_size: int, image_size: tuple[int, int] | None = None
    ) -> jax.stages.Compiled:
        """The compiled program `(params, images) -> Prediction` of a batch size; of a model with `max_patches`
        `(params, strips, grids)`, as `models.naflex.to_strips` makes them.

        image_size  height and width; None: the model's own.

        Raises DeviceError if the program does not fit the device.
        """
        size = image_size or self._own_shape
        with self._lock:
            if (batch_size, *size) not in self._programs:
                self._programs[batch_size, *size] = self._compile(batch_size, size)
                most = max(KEPT_PROGRAMS, len(self.batch_sizes) * len(self.program_sizes))
                while self.config.resizes and len(self._programs) > most:
                    self._programs.popitem(last=False)
                    if not (self.program_sizes or self._said_sizes):
                        self._said_sizes = say(
                            several_sizes(KEPT_PROGRAMS, self.config.image_shape)
                        )
            self._programs.move_to_end((batch_size, *size))
            return self._programs[batch_size, *size]

    def _compile(self, batch_size: int, size: tuple[int, int]) -> jax.stages.Compiled:
        arrays = self._abstract_arrays(batch_size, size)
        program = jax.jit(self._run).lower(self._params, *arrays).compile()
        check_fits(
            program,
            f"a batch of {batch_size} images of {size[0]}x{size[1]} pixels",
            "take a smaller --batch_size (batch_sizes)"
            + (", or smaller images" if self.config.resizes else ""),
        )
        return program

    @property
    def _own_shape(self) -> tuple[int, int]:
        """Height and width of what programs take."""
        config = self.config
        return naflex.strip_shape(config) if config.max_patches else config.image_shape

    def _abstract_arrays(
        self, batch_size: int, size: tuple[int, int]
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        images = jax.ShapeDtypeStruct((batch_size, *size, self.config.in_chans), np.uint8)
        grids = jax.ShapeDtypeStruct((batch_size, 2), np.int32)
        return (images, grids) if self.config.max_patches else (images,)

    def _run(self, params: Params, *arrays: jax.Array) -> Prediction:
        out: Any = self.output(params, *arrays)
        return Prediction(out.predictions, out.selected, out.scores)

    def output(
        self,
        params: Params,
        images: jax.Array,
        grids: jax.Array | None = None,
        *,
        tokens: bool = False,
    ) -> Output:
        """What the network gives for images, uint8 [b, height, width, c]: a pure function, to be compiled or exported.

        params  of `model`, by path.
        grids   of images that are strips of patches, as in a call of the model.
        tokens  whether `Output.tokens` is wanted of a classifier too.

        Predictions are float32, whatever the network computes in.
        """
        model: Any = set_params(self._graphdef, params)
        if grids is None:
            model = with_image_size(model, (images.shape[1], images.shape[2]))
        else:
            model = functools.partial(model, grids=grids)

        def all_of_it(images: jax.Array, key: jax.Array, **_: Any) -> Output:
            return model(images, key=key)

        # A fixed key: the method "random" then selects the same tokens in every call.
        run = all_of_it if tokens else model
        out: Any = self.task.predict(run, {"image": images}, jax.random.key(0))
        predictions = {name: x.astype(np.float32) for name, x in out.predictions.items()}
        return out._replace(predictions=predictions)

    def _check(self, images: np.ndarray) -> None:
        config = self.config
        any_size = config.resizes or config.max_patches > 0
        size = ("height", "width") if any_size else config.image_shape
        fits = images.ndim == 4 and images.shape[3] == config.in_chans and min(images.shape[1:]) > 0
        check(
            images.dtype == np.uint8 and fits and (any_size or images.shape[1:3] == size),
            f"images are {images.dtype} {list(images.shape)}, but must be uint8 [b, {size[0]}, {size[1]}, "
            f"{config.in_chans}]: Predictor.prepare makes them",
        )

    def _check_classes(self) -> None:
        self._check_task("classification", "classes")
        features = "out = predictor(images); out.features, with images from Predictor.prepare"
        check(
            not self.config.projection,
            f"this model embeds images and has no classes: use {features}",
        )
        check(
            self.config.num_classes > 0,
            f"this model has no classes (num_classes=0): use {features}",
        )

    def _check_task(self, task: str, what: str) -> None:
        own = {"classification": "Predictor.classify", "depth": "Predictor.depth"}
        check(
            self.task_name == task,
            f"this model is for {self.task_name} and has no {what}: call "
            f"{own.get(self.task_name, 'the predictor with images from Predictor.prepare')}",
        )


def load(
    source: Weights,
    *,
    keep_rate: KeepRate = None,
    name: str = "",
    selectors: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    checkpoint_key: str | None = None,
    prefix: str = "",
    on_message: OnMessage = print,
    **fields: Any,
) -> Predictor:
    """A network with all that its files state: what it is, its classes, how images are prepared.

    Read are the config.json and preprocessor_config.json of transformers, timm's config.json, the header of this
    project's files and the config.json of a work directory. What nothing states is a guess, which is said.

    source       a folder, a file or a work directory, `hf:owner/name`, or arrays by name: what `load_pretrained` reads.
    keep_rate    share in (0, 1] of the patches that selective layers process: one, or one a selection. None, without
                 `budget_gmacs` and `selectors`: the network as it is stated, which is dense for released weights.
    name         timm's name, for weights that state no network.
    selectors    a file of `save_selectors`.
    class_names  one a class; None: as stated.
    checkpoint_key, prefix   which weights of the file, as in `load_pretrained`.
    on_message   receives one line for each part that was changed, left out or guessed.
    fields       fields of the configuration that differ from what is stated, such as `image_size`, `budget_gmacs`,
                 `num_classes=0` or `task`, and arguments of `Predictor`.

    Raises ConfigError (unknown name or field), WeightsError (missing or damaged, nothing states the network, or a part
    of it would be random), WorkdirError.
    """
    options, fields = _own_options(fields)
    found = loading.load(
        source, name, selectors, keep_rate, class_names, on_message,
        checkpoint_key=checkpoint_key, prefix=prefix, **fields,
    )  # fmt: skip
    return Predictor(**{**found, **options})


def _own_options(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `Predictor` itself, and fields of the model's configuration."""
    own = ("form", "mean", "std", "options", "batch_sizes", "program_sizes")
    options = {name: x for name, x in fields.items() if name in own}
    return options, {name: x for name, x in fields.items() if name not in own}


def _several(images: Any) -> Any:
    """The images; a single one, which can be iterated over too, is refused."""
    single = isinstance(images, str | bytes | os.PathLike | Image.Image) or hasattr(images, "read")
    check(not single, "images must be a list of images: for a single one write [image]")
    return images


def _a_channel(name: str, values: Any, channels: int) -> tuple[float, ...]:
    """One value a channel; a single value is repeated."""
    given = values if are_many(values) else (values,)
    found = tuple(plain_value(name, value, float) for value in given)
    found *= channels if len(found) == 1 else 1
    check(
        len(found) == channels,
        f"{name}={found} is not one value for each of {channels} channels: pass {name} with as many",
    )
    return found
