"""A trained network at work: uint8 images in, logits and selected tokens out, at batch sizes compiled once."""

import functools
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from tosa_jax import network_sources
from tosa_jax.data.class_names import default_names
from tosa_jax.data.decoding import Form
from tosa_jax.memory import check_fits
from tosa_jax.models.params import Params, set_params, split
from tosa_jax.models.vit import VisionTransformer
from tosa_jax.models.vit_config import ViTConfig, check
from tosa_jax.network_sources import IMAGENET_MEAN, IMAGENET_STD, KeepRate, Say
from tosa_jax.tasks.classification import Classification


class Guess(NamedTuple):
    """A class, its name, and its probability in [0, 1]."""

    label: int
    name: str
    probability: float


class Prediction(NamedTuple):
    """What a network says of `b` images.

    logits    float32 [b c].
    selected  one int32 [b s] a selection: indices into the tokens, ascending, prefix included.
    scores    one float [b n] a selection: what it chose by, higher is better.
    """

    logits: np.ndarray
    selected: tuple[np.ndarray, ...]
    scores: tuple[np.ndarray, ...]

    @property
    def probabilities(self) -> np.ndarray:
        """float32 [b c], each row sums to 1."""
        powers = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


class Predictor:
    """Runs a network on any number of images; threads may share it.

    Programs are compiled for `batch_sizes` alone, each at its first use (or by `warm_up`); a batch of another size
    is split and padded to them. Made by `from_workdir`, `from_pretrained` or `from_weights`, or of a model:

    >>> model = tosa_jax.create_model("vit", image_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2,
    ...     num_classes=3, keep_rate=0.5, rngs=nnx.Rngs(0))
    >>> predictor = tosa_jax.Predictor(model, class_names=("cat", "dog", "owl"), batch_sizes=(1, 4))
    >>> out = predictor(np.zeros((6, 8, 8, 3), np.uint8))
    >>> out.logits.shape, [chosen.shape for chosen in out.selected]
    ((6, 3), [(6, 3)])

    Args:
        model: the network; its parameters stay where they are, on one device.
        form: how pictures become arrays; None: DeiT's evaluation.
        mean, std: of each channel's pixels in [0, 1], as in training.
        class_names: one a class; None: ImageNet's for 1000 classes, else numbers.
        batch_sizes: the sizes to compile.

    Raises ConfigError: no batch size, one below 1, or another number of names than of classes.
    """

    def __init__(
        self,
        model: VisionTransformer,
        *,
        form: Form | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        class_names: Sequence[str] | None = None,
        batch_sizes: Sequence[int] = (1, 8, 64),
    ) -> None:
        config = model.config
        check(len(batch_sizes) > 0 and min(batch_sizes) >= 1,
              f"batch_sizes={tuple(batch_sizes)} must be numbers of at least 1")  # fmt: skip
        names = default_names(config.num_classes) if class_names is None else tuple(class_names)
        check(len(names) == config.num_classes,
              f"{len(names)} class names, but the network has {config.num_classes} classes")  # fmt: skip
        mean, std = (_a_channel(values, config.in_chans) for values in (mean, std))
        self.config: ViTConfig = config
        self.form = form or network_sources.form_of("", config.image_size, config.in_chans)
        self.class_names = names
        self.batch_sizes = tuple(sorted(set(batch_sizes)))
        self._task = Classification(num_classes=config.num_classes, mean=mean, std=std)
        self._graphdef, self._params = split(model)
        self._programs: dict[int, jax.stages.Compiled] = {}
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
        found = network_sources.from_workdir(Path(workdir).expanduser(), keep_rate, on_message)
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
        through the evaluation that the weights were published with (`network_sources.form_of`).

        selectors    a file of `save_selectors`; without one, layers choose by the map of the layer before them.
        class_names  one a class; sets `num_classes`.
        fields       any field of `ViTConfig`, and the options of `Predictor`.

        Raises ConfigError (unknown name or field), WeightsError (missing, damaged or other weights).
        """
        own = {"form", "mean", "std", "batch_sizes"} & fields.keys()
        options = {option: fields.pop(option) for option in own}
        found = network_sources.from_pretrained(
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
        return cls(**(network_sources.from_weights(path, keep_rate, on_message) | options))

    def save(self, path: str | Path) -> None:
        """Writes network, preprocessing and class names to one `.safetensors` file, for `from_weights`."""
        network_sources.save(
            network_sources.Network(
                model=set_params(self._graphdef, self._params),
                form=self.form,
                mean=self._task.mean,
                std=self._task.std,
                class_names=self.class_names,
            ),
            path,
        )

    def prepare(self, image: str | Path | bytes | np.ndarray | Image.Image) -> np.ndarray:
        """A picture of any size as the network takes it: uint8 [s s c].

        image  a path, encoded bytes, uint8 [height width 1 or 3], or PIL's.

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
        """images uint8 [b s s c] from `prepare`, b >= 0 -> a `Prediction` of as many rows.

        Raises ConfigError (another dtype or shape), DeviceError (a compiled batch size does not fit the device).
        """
        images, config = np.asarray(images), self.config
        shape = (config.image_size, config.image_size, config.in_chans)
        check(images.dtype == np.uint8 and images.shape[1:] == shape,
              f"images are {images.dtype} {list(images.shape)}, but must be uint8 [b, {', '.join(map(str, shape))}]: "
              "Predictor.prepare makes them")  # fmt: skip
        if not len(images):
            empty = jax.tree.map(lambda x: x[:0], self(np.zeros((1, *shape), np.uint8)))
            return Prediction(*empty)
        parts, start = [], 0
        for size in split_batch(len(images), self.batch_sizes):
            part = images[start : start + size]
            padded = np.concatenate([part, np.zeros((size - len(part), *shape), np.uint8)])
            parts.append((len(part), self.program(size)(self._params, padded)))
            start += size
        parts = [jax.tree.map(lambda x, n=n: x[:n], out) for n, out in jax.device_get(parts)]
        return Prediction(*jax.tree.map(lambda *xs: np.concatenate(xs), *parts))

    def top(self, prediction: Prediction, k: int = 5) -> list[list[Guess]]:
        """The `k` likeliest classes of each image, the likeliest first; all where there are fewer."""
        rows = []
        for row in prediction.probabilities:
            best = np.argsort(-row, kind="stable")[:k]
            rows.append([Guess(int(i), self.class_names[i], float(row[i])) for i in best])
        return rows

    def classify(
        self, images: Iterable[str | Path | bytes | np.ndarray | Image.Image], k: int = 5
    ) -> list[list[Guess]]:
        """`prepare`, the network and `top` in one call."""
        return self.top(self(np.stack([self.prepare(image) for image in images])), k)

    @functools.cached_property
    def num_selections(self) -> int:
        """How many times the network selects tokens; 0: it runs densely."""
        return len(jax.eval_shape(self._run, self._params, self._abstract_images(1))[1])

    def warm_up(self) -> None:
        """Compiles every batch size now, so that no first call waits for it."""
        for size in self.batch_sizes:
            self.program(size)

    def program(self, batch_size: int) -> jax.stages.Compiled:
        """The compiled program `(params, images) -> (logits, selected, scores)` of a batch size."""
        with self._lock:
            if batch_size not in self._programs:
                program = (
                    jax.jit(self._run)
                    .lower(self._params, self._abstract_images(batch_size))
                    .compile()
                )
                check_fits(
                    program,
                    f"a batch of {batch_size} images",
                    "take a smaller --batch_size (batch_sizes)",
                )
                self._programs[batch_size] = program
            return self._programs[batch_size]

    def _abstract_images(self, batch_size: int) -> jax.ShapeDtypeStruct:
        side, channels = self.config.image_size, self.config.in_chans
        return jax.ShapeDtypeStruct((batch_size, side, side, channels), np.uint8)

    def _run(self, params: Params, images: jax.Array) -> tuple:
        network = set_params(self._graphdef, params)
        # The key is for random selection, which then draws the same each time.
        out = network(self._task.inputs(images), key=jax.random.key(0))
        return out.logits.astype(np.float32), out.selected, out.scores


def split_batch(count: int, sizes: Sequence[int]) -> list[int]:
    """Sizes, ascending, that hold `count` images in order: as few as go with at most half of one padding.

    >>> split_batch(70, (1, 8, 64)), split_batch(9, (1, 8, 64))
    ([64, 8], [8, 1])
    """
    chosen = []
    while count > 0:
        fitting = [size for size in sizes if size <= count]
        padded = next((size for size in sizes if size >= count), sizes[-1])
        size = padded if padded <= 2 * count or not fitting else fitting[-1]
        chosen.append(size)
        count -= size
    return chosen


def _a_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value a channel; one given serves all."""
    values = tuple(values) * (channels if len(values) == 1 else 1)
    check(
        len(values) == channels,
        f"mean and std {values} are not one value for each of {channels} channels",
    )
    return values
